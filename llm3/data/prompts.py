"""A prompt as a model reads it: continued as it is, answered with a chat template, or with mask tokens to fill in."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from llm3.config.model_schema import ModelConfig, check_length
from llm3.data.chat_templates import end_of_turn, has_system_role, is_written, question, text_of, without_lead, written
from llm3.data.encoding import encode_pieces
from llm3.data.formats import BadRow, dialogue
from llm3.data.tokenizer import Pieces, Tokenizer
from llm3.errors import UserError

CONTEXT = 8  # tokens before a text that can change how a decoder begins it


class Prompt(NamedTuple):
    """A prompt. tokens: what the model continues. end: tokens that end an answer, besides `Tokenizer.end_ids`.

    answers: whether the prompt is the user's turn, which the model answers; else it continues the prompt. lead: what
    the template puts before an answer.
    """

    tokens: list[int]
    end: list[int]
    answers: bool
    lead: str

    def text(self, made: list[int], tokenizer: Tokenizer) -> str:
        """The text of the tokens that a model made: an answer, or what it adds to the prompt.

        As long as an answer may be no more than the lead, its text is empty: while it is made, no text is taken back.
        """
        text = tokenizer.continuation(self.tokens[-CONTEXT:], made)
        if self.answers and self.lead and self.lead.startswith(text.strip()):
            return ""
        return without_lead(self.lead, text) if self.answers else text


def read_prompt(prompt: str, template: str, tokenizer: Tokenizer, raw: bool = False) -> Prompt:
    """The prompt for a model that was trained with a chat template; "": with none.

    The template takes the prompt for the user's turn, except where it is written with the template already, or with
    `raw`. Raises UserError if the template cannot render it.
    """
    before: Pieces = [*tokenizer.starts, prompt]
    finished = bool(template) and is_written(prompt, template, tokenizer)
    answers, lead = bool(template) and not raw and not finished, ""
    if answers:
        asked = question(prompt, template, tokenizer)
        before, lead = asked.before, text_of(asked.lead)
    elif finished and not raw:
        before = written(prompt, tokenizer)
    tokens = encode_pieces(before, tokenizer, joint=answers or (finished and not raw))
    return Prompt(tokens, encode_pieces(end_of_turn(template, tokenizer), tokenizer), answers, lead)


def read_conversation(messages: Any, template: str, tokenizer: Tokenizer) -> Prompt:
    """The prompt for the assistant's next turn. messages: a list of {role, content}, of which the user has the last.

    Without a template, contents follow each other. Raises UserError, also for a system prompt that the template would
    skip.
    """
    try:
        turns = dialogue.read_turns(messages, "messages", answered=False)
        if turns[-1][0] != "user":
            raise BadRow("messages: the last turn is not the user's")
        if turns[0][0] == "system" and template and not has_system_role(template, tokenizer):
            raise BadRow("messages: the chat template has no system role; leave the system prompt out")
        document = dialogue.encode_prompt({"turns": turns}, tokenizer, template)
    except BadRow as error:
        raise UserError(str(error)) from None
    note = document.note or {}
    return Prompt(document.tokens.tolist(), note["end"], True, note.get("lead", ""))


def mask_text(tokenizer: Tokenizer) -> str:
    """How a prompt spells the mask token. Raises UserError if the tokenizer has none."""
    return next(text for text, number in tokenizer.specials.items() if number == tokenizer.need_mask())


def with_masks(prompt: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a prompt as a document, with the mask token where the prompt spells it."""
    first, *rest = tokenizer.encode_batch(prompt.split(mask_text(tokenizer)))
    inner = [token for each in rest for token in (tokenizer.need_mask(), *each)]
    return [*tokenizer.starts, *first, *inner, tokenizer.eos_id]


def check_prompts(
    prompts: Sequence[str], max_tokens: int, model: ModelConfig, tokenizer: Tokenizer, template: str, where: str
) -> None:
    """Raise UserError for a prompt that is too long for the model's positions, or has no mask for a bidirectional one.

    max_tokens: of a continuation. where: the field of the prompts.
    """
    for number, prompt in enumerate(prompts):
        field = f"{where}[{number}]"
        if model.causal:
            longest = max(len(read_prompt(prompt, each, tokenizer).tokens) for each in ("", template))
            check_length(model, longest + max_tokens, f"{field} and the max tokens of a sample")
            continue
        if tokenizer.mask_id is None or mask_text(tokenizer) not in prompt:
            expected = repr(mask_text(tokenizer)) if tokenizer.mask_id is not None else "a tokenizer with a mask token"
            raise UserError(f"{field}={prompt!r}: a bidirectional model fills in mask tokens: expected {expected}")
        check_length(model, len(with_masks(prompt, tokenizer)), field)

"""Chat templates turn conversations into text. They are jinja sources, as `chat_template` of a tokenizer's config."""

import hashlib
import json
import re
from pathlib import Path
from typing import NamedTuple

import jinja2

from llm3.data.template_rendering import (
    ANSWER,
    GUARD,
    OWN_NAMES,
    RESERVED,
    Names,
    TemplateError,
    Turns,
    names_of,
    render,
)
from llm3.data.tokenizer import SPECIALS, Pieces, Tokenizer
from llm3.errors import UserError, say
from llm3.files import CHAT_TEMPLATE, local_path

EXAMPLE = (("user", "Question?"), ("assistant", "Answer."))


class Answer(NamedTuple):
    """One answer of a conversation.

    before: the prompt, from the end of the previous answer. lead: what the template itself puts at the start of the
    answer, usually nothing. text: the answer. end: the end of the turn.
    """

    before: Pieces
    lead: Pieces
    text: str
    end: Pieces


def load_template(text_or_path: str, tokenizer: Tokenizer | None = None) -> str:
    """The source of a template, given as source (with a jinja block) or as the name of a file.

    A JSON file is read as a tokenizer's config. Raises UserError for a file that cannot be read, a syntax error (with
    its line), and a template that `split_answers` cannot use for a question and its answer.
    """
    where, source = "tokenizer.chat_template", text_or_path
    if text_or_path and not _is_source(text_or_path):
        where = f"{where}={text_or_path!r}"
        try:
            source = local_path(text_or_path, "tokenizer.chat_template").read_text(encoding="utf-8")
            source = json.loads(source)["chat_template"] if text_or_path.endswith(".json") else source
        except FileNotFoundError:
            raise UserError(f"{where}: neither a file nor a jinja template") from None
        except (OSError, ValueError, KeyError, TypeError) as error:  # bad UTF-8 and bad JSON are ValueErrors
            raise UserError(f"{where}: cannot be read: {type(error).__name__}: {error}") from None
        if not isinstance(source, str):
            raise UserError(f"{where}: chat_template is of type {type(source).__name__}, expected a text")
    try:
        split_answers(EXAMPLE, source, tokenizer)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{where}: line {error.lineno}: {error.message}") from None
    except TemplateError as error:
        raise UserError(f"{where}: with a question and its answer: {error}") from None
    return source


def _is_source(text_or_path: str) -> bool:
    return re.search(r"\{[{%]", text_or_path) is not None


def read_template(text_or_path: str, workdir: Path, tokenizer: Tokenizer | None = None) -> str:
    """The template of a run: the one kept in its workdir, else that of the config or the tokenizer; "": none.

    A template that came with the tokenizer and cannot be used is left out, which is said. Raises UserError as
    `load_template`, and if the config names another template than the workdir keeps.
    """
    kept = kept_template(workdir)
    is_path = bool(text_or_path) and not _is_source(text_or_path)
    if kept and is_path and not local_path(text_or_path, "config.tokenizer.chat_template").exists():
        return kept
    configured = load_template(text_or_path, tokenizer) if text_or_path else _that_came_with(tokenizer)
    if kept and configured != kept:
        raise UserError(
            f"tokenizer.chat_template={text_or_path[:80]!r} is not the chat template that this run began with: restore "
            f"it from {workdir / CHAT_TEMPLATE}, or use another --workdir"
        )
    return configured


def _that_came_with(tokenizer: Tokenizer | None) -> str:
    if tokenizer is None or not tokenizer.chat_template:
        return ""
    try:
        split_answers(EXAMPLE, tokenizer.chat_template, tokenizer)
    except (TemplateError, jinja2.TemplateSyntaxError) as error:
        say(f"tokenizer.chat_template: the one that came with the tokenizer is not used: {error}")
        return ""
    return tokenizer.chat_template


def kept_template(workdir: Path) -> str:
    """The template that is kept in the directory of a run; "" if there is none. Raises UserError if it is damaged."""
    try:
        return (workdir / CHAT_TEMPLATE).read_bytes().decode()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{workdir / CHAT_TEMPLATE} cannot be read ({error}); restore it") from None


def trained_template(workdir: Path, stage: str, expected: str | None) -> str:
    """The template that a stage was trained with. expected: its `template_hash`; None or "": the stage had none.

    Raises UserError if the workdir does not hold it.
    """
    if not expected:
        return ""
    kept = kept_template(workdir)
    if template_hash(kept) != expected:
        wrong = "is not the chat template" if kept else "is missing: restore the chat template"
        raise UserError(f"{workdir / CHAT_TEMPLATE} {wrong} that {stage} was trained with (sha256 {expected[:12]})")
    return kept


def template_hash(template: str) -> str:
    """The sha256 of a template; "" for none."""
    return hashlib.sha256(template.encode()).hexdigest() if template else ""


def question(prompt: str, template: str, tokenizer: Tokenizer | None = None) -> Answer:
    """The prompt of the first turn as training has it, with what leads and what ends its answer.

    Raises UserError if the template cannot render it.
    """
    try:
        return split_answers([("user", prompt), EXAMPLE[1]], template, tokenizer)[0]
    except TemplateError as error:
        raise UserError(f"the prompt cannot be written with the chat template: {error}") from None


def has_system_role(template: str, tokenizer: Tokenizer | None = None) -> bool:
    """Whether a template writes a system prompt: some reject it, and some skip it."""
    names = names_of(tokenizer)
    try:
        one, other = (render(template, [("system", each), EXAMPLE[0]], names) for each in ("One.", "Other."))
    except TemplateError:
        return False
    return one != other


def end_of_turn(template: str, tokenizer: Tokenizer | None = None) -> Pieces:
    """What ends an answer: the template's end of turn, or <eos>."""
    return split_answers(EXAMPLE, template, tokenizer)[0].end if template else [names_of(tokenizer).eos]


def is_written(prompt: str, template: str, tokenizer: Tokenizer | None = None) -> bool:
    """Whether a prompt is written with the template already: it ends as the template ends a prompt."""
    names = names_of(tokenizer)
    end = render(template, [("user", ANSWER)], names, add_generation_prompt=True).partition(ANSWER)[2]
    parts = [part for part in names.parts(end) if part]
    if names.own:
        end = parts[-1].strip() if parts and parts[-1] not in names.ids else ""
    else:  # a last part as short as "assistant" ends other prompts too, so the special token before it counts
        special = [number for number, part in enumerate(parts) if part in names.ids]
        end = "".join(parts[special[-1] :] if special else parts).strip()
    return bool(end) and prompt.rstrip().endswith(end)


def written(prompt: str, tokenizer: Tokenizer) -> Pieces:
    """A prompt that is written with a template of others, with its special tokens by id."""
    return names_of(tokenizer).pieces(prompt) if tokenizer.foreign else [*tokenizer.starts, prompt]


def with_bos(template: str) -> str:
    """A template that writes the <bos> with which every document of llm3's own tokenizers begins."""
    begins = render(template, EXAMPLE, OWN_NAMES).startswith(SPECIALS[OWN_NAMES.starts[0]])
    return template if begins else "{{ bos_token }}" + template


def text_of(pieces: Pieces) -> str:
    """The text of pieces, without special tokens and outer white space."""
    return "".join(piece for piece in pieces if isinstance(piece, str)).strip()


def without_lead(lead: str, answer: str) -> str:
    """An answer without the text that the template puts at its start."""
    return answer.lstrip().removeprefix(lead) if lead else answer


def split_answers(turns: Turns, template: str, tokenizer: Tokenizer | None = None) -> list[Answer]:
    """The answers of a conversation, one for each turn of the assistant, who has the last turn.

    An answer ends with the template's end of turn, or with <eos> if it has none; white space after the end belongs to
    the next prompt. With llm3's own tokenizers (tokenizer: None or one of them) there is one <bos>, at the start;
    others write what the template writes. Without a template, contents follow each other unchanged, a system prompt in
    lines of its own. Raises TemplateError.
    """
    names = names_of(tokenizer)
    return _templated(turns, template, names) if template else _bare(turns, names)


def _bare(turns: Turns, names: Names) -> list[Answer]:
    result, before = [], ""
    for role, content in turns:
        if role == "assistant":
            result.append(Answer([before], [], content, [names.eos]))
            before = ""
        else:
            before += f"{content}\n\n" if role == "system" else content
    result[0].before[:0] = names.starts
    return result


def _templated(turns: Turns, template: str, names: Names) -> list[Answer]:
    if any(RESERVED.search(content) for _, content in turns):
        raise TemplateError(
            "a text has a character from U+10FF01 to U+10FF03; they stand for special tokens in a chat template"
        )
    turns = [(role, names.guarded(content)) for role, content in turns]
    whole, read, result = render(template, turns, names), 0, []
    for place, (role, content) in enumerate(turns):
        if role != "assistant":
            continue
        before, answer = turns[:place], ("assistant", ANSWER)
        prompt = render(template, before, names, add_generation_prompt=True)
        marked = render(template, [*before, answer, *turns[place + 1 :]], names)
        alone = render(template, [*before, answer], names)
        head, _, rest = marked[len(prompt) :].partition(ANSWER)
        tail = alone[len(prompt) :].partition(ANSWER)[2]
        end = tail.rstrip()
        if not (all(each.startswith(prompt) for each in (whole, marked, alone)) and rest.startswith(end)):
            raise TemplateError("the chat template renders the turns before an answer differently with and without it")
        made = whole[len(prompt) :]
        kept = made[len(head) : len(made) - len(rest)]
        if made != head + kept + rest or kept.strip() != content.strip():
            raise TemplateError("the chat template changes an answer")
        lead, text = _pieces(head, names), kept.replace(GUARD, "")
        result.append(Answer(_pieces(whole[read : len(prompt)], names), lead, text, _pieces(end, names) or [names.eos]))
        read = len(prompt) + len(head) + len(kept) + len(end)
    if names.own:
        result[0].before[:0] = names.starts
    return result


def _pieces(text: str, names: Names) -> Pieces:
    """Texts and special tokens that a template wrote; without <bos> with llm3's own tokenizers, which begin with it."""
    return [piece for piece in names.pieces(text) if not (names.own and piece in names.starts)]


def prompt_text(turns: Turns, template: str, tokenizer: Tokenizer, continues: bool = False) -> str:
    """A conversation up to where the assistant answers, as the template writes it.

    Special tokens that a message spells are broken; `prompt_pieces` reads the result, also within a longer text.
    continues: end within the last turn, which goes on, instead. Raises TemplateError.
    """
    if any(RESERVED.search(content) for _, content in turns):
        raise TemplateError("a text has a character from U+10FF01 to U+10FF03, which a chat template needs")
    names = names_of(tokenizer)
    guarded = [(role, names.guarded(content)) for role, content in turns]
    if not continues:
        return render(template, guarded, names, add_generation_prompt=True)
    role, content = guarded[-1]
    return render(template, [*guarded[:-1], (role, content + ANSWER)], names).partition(ANSWER)[0]


def prompt_pieces(text: str, tokenizer: Tokenizer) -> Pieces:
    """The texts and special tokens of a text of `prompt_text`, <bos> included."""
    return names_of(tokenizer).pieces(text)

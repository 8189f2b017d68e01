"""A prompt and its answer, or a conversation of several turns. The answers, with their ends, are the targets."""

from collections.abc import Mapping
from typing import Any

from llm3.config.data_schema import SourceConfig
from llm3.data import chat_templates
from llm3.data.chat_templates import Answer, TemplateError, Turns, split_answers
from llm3.data.encoding import encode_pieces, encode_runs, merge_texts
from llm3.data.formats import BadRow, Document, bytes_of, structure, text_of, value
from llm3.data.tokenizer import Pieces, Tokenizer

ROLES = ("system", "user", "assistant")
ALIASES = {
    "developer": "system",
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "model", "bot"), "assistant"),
}
CALLS = ("tool_calls", "function_call")  # fields of a turn that a text does not hold


def read_row(row: Mapping[str, Any], source: SourceConfig) -> dict[str, Any]:
    """{"turns": [[role, content], ...], "references": correct answers to the last prompt}. Raises BadRow."""
    if source.messages:
        turns = read_turns(structure(row, source.messages), source.messages)
        return {"turns": turns, "references": [turns[-1][1]]}
    references = _references(row, source.answer)
    return {"turns": [["user", text_of(row, source.prompt)], ["assistant", references[0]]], "references": references}


def read_input(row: Mapping[str, Any], source: SourceConfig) -> dict[str, Any]:
    """{"turns": [[role, content], ...]} up to the user's last turn; a last answer is left out. Raises BadRow."""
    if not source.messages:
        return {"turns": [["user", text_of(row, source.prompt)]]}
    turns = read_turns(structure(row, source.messages), source.messages, answered=False)
    return {"turns": turns[:-1] if turns[-1][0] == "assistant" else turns}


def columns(source: SourceConfig) -> list[str]:
    """The field of the turns, or of the prompt."""
    return [source.messages or source.prompt]


def _references(row: Mapping[str, Any], field: str) -> list[str]:
    several = row.get(field)
    if not isinstance(several, list | tuple):
        return [text_of(row, field)]
    if not several:
        raise BadRow(f"{field} is empty")
    return [text_of({field: each}, field) for each in several]


def read_turns(messages: Any, field: str, *, answered: bool = True) -> list[list[str]]:
    """[[role, content], ...]: a system prompt or none, then user and assistant in turn. Raises BadRow.

    answered: the last turn must be the assistant's. A message is {role, content}, or {from, value} as in ShareGPT.
    """
    if not isinstance(messages, list | tuple) or not all(isinstance(each, Mapping) for each in messages):
        raise BadRow(f"{field} is not a list of {{role, content}}")
    turns, content_of = [], f"a content of {field}"
    for message in messages:
        names = ("from", "value") if message.get("role") is None and "from" in message else ("role", "content")
        role = value(message, names[0])
        role = ALIASES.get(role.lower(), role.lower()) if isinstance(role, str) else role
        if role not in ROLES:
            raise BadRow(f"{field}: a role is not one of {', '.join(ROLES)}")
        if any(message.get(name) for name in CALLS):
            raise BadRow(f"{field}: a turn calls a tool")
        content = _joined(value(message, names[1]), field)
        if role != "system" or content != "":  # many data sets have an empty system prompt for none
            turns.append([role, text_of({content_of: content}, content_of)])
    roles = [role for role, _ in turns]
    if answered and "assistant" not in roles:
        raise BadRow(f"{field}: no turn is the assistant's")
    if not answered and "user" not in roles:
        raise BadRow(f"{field}: no turn is the user's")
    if answered and roles[-1] != "assistant":
        raise BadRow(f"{field}: the last turn is not the assistant's")
    talk = roles[1:] if roles[0] == "system" else roles
    if "system" in talk:
        raise BadRow(f"{field}: a system prompt is not at the start")
    if talk != (["user", "assistant"] * len(talk))[: len(talk)]:
        raise BadRow(f"{field}: user and assistant do not alternate")
    return turns


def _joined(content: Any, field: str) -> Any:
    """The text of a content that is a list of parts, as in the interface of OpenAI. Raises BadRow."""
    if not isinstance(content, list | tuple):
        return content
    parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
    texts = [part for part in parts if isinstance(part, str)]
    if not texts or len(texts) < len(parts):
        raise BadRow(f"{field}: a part of a content is not a text")
    return "".join(texts)


def encode(record: dict[str, Any], tokenizer: Tokenizer, template: str) -> Document:
    """The conversation; its answer mask covers each answer and its end.

    See `encode_runs` for what is encoded together. note: "references", if
    there are several; "end", the tokens that end the last answer, if not <eos>; "lead", the text that the template
    puts at the start of the answer (part of the mask). Raises BadRow.
    """
    parts = render_answers(record["turns"], template, tokenizer)
    runs: list[tuple[Pieces, bool]] = []
    for part in parts:
        runs += [(part.before, False), (merge_texts([*part.lead, part.text]), True), (part.end, True)]
    note: dict[str, Any] = {"references": record["references"]} if len(record["references"]) > 1 else {}
    if parts[-1].end != [tokenizer.eos_id]:
        note["end"] = encode_pieces(parts[-1].end, tokenizer)
    if lead := chat_templates.text_of(parts[-1].lead):
        note["lead"] = lead
    tokens, labelled = encode_runs(runs, tokenizer, joint=bool(template))
    return Document(tokens, labelled, bytes_of(texts(record)), note=note or None)


def encode_prompt(record: dict[str, Any], tokenizer: Tokenizer, template: str) -> Document:
    """The turns of `read_input`, up to where the assistant answers. Raises BadRow.

    note: "end" and "lead" of the answer, as of `encode`.
    """
    parts = render_answers([*record["turns"], chat_templates.EXAMPLE[1]], template, tokenizer)
    runs: list[tuple[Pieces, bool]] = []
    for part in parts[:-1]:
        runs += [(part.before, False), (merge_texts([*part.lead, part.text]), False), (part.end, False)]
    last = parts[-1]
    tokens, _ = encode_runs([*runs, (last.before, False)], tokenizer, joint=bool(template))
    note: dict[str, Any] = {"end": encode_pieces(last.end, tokenizer)}
    if lead := chat_templates.text_of(last.lead):
        note["lead"] = lead
    return Document(tokens, None, bytes_of(texts(record)), note=note)


def render_answers(turns: Turns, template: str, tokenizer: Tokenizer) -> list[Answer]:
    """The answers of a conversation. Raises BadRow if the template cannot render it."""
    try:
        return split_answers(turns, template, tokenizer)
    except TemplateError as error:
        raise BadRow(str(error)) from None


def texts(record: dict[str, Any]) -> list[str]:
    """The contents of all turns."""
    return [content for _, content in record["turns"]]

"""A prompt and its answer, or a conversation of several turns: what is learnt are the answers, each with its end."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llm3.config.data_schema import SourceConfig
from llm3.data.chat_templates import Answer, TemplateError, Turns, encode_pieces, merge_texts, split_answers
from llm3.data.formats import BadRow, Document, bytes_of, text_of, value
from llm3.data.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")


def read_row(row: Mapping[str, Any], source: SourceConfig) -> dict[str, Any]:
    """{"turns": [[role, content], ...], "references": the right answers to the last question}. Raises BadRow."""
    if source.messages:
        turns = read_turns(value(row, source.messages), source.messages)
        return {"turns": turns, "references": [turns[-1][1]]}
    references = _references(row, source.answer)
    return {"turns": [["user", text_of(row, source.prompt)], ["assistant", references[0]]], "references": references}


def _references(row: Mapping[str, Any], field: str) -> list[str]:
    several = row.get(field)
    if not isinstance(several, list | tuple):
        return [text_of(row, field)]
    if not several:
        raise BadRow(f"{field} is empty")
    return [text_of({field: each}, field) for each in several]


def read_turns(messages: Any, field: str) -> list[list[str]]:
    """[[role, content], ...]: perhaps a system's text, then a user and the assistant in turn. Raises BadRow."""
    if not isinstance(messages, list | tuple) or not all(isinstance(each, Mapping) for each in messages):
        raise BadRow(f"{field} is not a list of {{role, content}}")
    turns, content_of = [], f"a content of {field}"
    for message in messages:
        role, content = value(message, "role"), value(message, "content")
        if role not in ROLES:
            raise BadRow(f"{field}: a role is none of {', '.join(ROLES)}")
        if role != "system" or content != "":  # many data sets have an empty system's text for none
            turns.append([role, text_of({content_of: content}, content_of)])
    roles = [role for role, _ in turns]
    if "assistant" not in roles:
        raise BadRow(f"{field}: the assistant says nothing")
    if roles[-1] != "assistant":
        raise BadRow(f"{field}: the last turn is not the assistant's")
    talk = roles[1:] if roles[0] == "system" else roles
    if "system" in talk:
        raise BadRow(f"{field}: a system's text is not at the start")
    if talk != ["user", "assistant"] * (len(talk) // 2):
        raise BadRow(f"{field}: user and assistant do not take turns")
    return turns


def encode(record: dict[str, Any], tokenizer: Tokenizer, template: str) -> Document:
    """Labelled are each answer's tokens and its end. Each is encoded apart from its prompt, as a prompt alone will be.

    note: "references", where there are several; "end", the tokens that end the last answer, where these are not <eos>;
    "lead", what a template begins it with, and is labelled as well. Raises BadRow.
    """
    parts = render_answers(record["turns"], template)
    runs: list[tuple[list[int], bool]] = []
    for part in parts:
        runs.append((encode_pieces(part.before, tokenizer), False))
        answer = merge_texts([*part.lead, part.text])
        runs += [(encode_pieces(pieces, tokenizer), True) for pieces in (answer, part.end)]
    note: dict[str, Any] = {"references": record["references"]} if len(record["references"]) > 1 else {}
    if parts[-1].end != [tokenizer.eos_id]:
        note["end"] = runs[-1][0]
    if lead := "".join(piece for piece in parts[-1].lead if isinstance(piece, str)).strip():
        note["lead"] = lead
    tokens, labelled = concatenate_runs(runs)
    return Document(tokens, labelled, bytes_of(texts(record)), note=note or None)


def render_answers(turns: Turns, template: str) -> list[Answer]:
    """The conversation as its answers. Raises BadRow where the template cannot write it."""
    try:
        return split_answers(turns, template)
    except TemplateError as error:
        raise BadRow(str(error)) from None


def concatenate_runs(runs: Sequence[tuple[list[int], bool]]) -> tuple[np.ndarray, np.ndarray]:
    """Runs of tokens end to end: int32 [n], and bool [n], which of them are labelled."""
    tokens = np.concatenate([np.array(run, np.int32) for run, _ in runs])
    return tokens, np.repeat([labelled for _, labelled in runs], [len(run) for run, _ in runs])


def texts(record: dict[str, Any]) -> list[str]:
    """The contents of all turns."""
    return [content for _, content in record["turns"]]

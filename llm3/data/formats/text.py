"""Running text, or a pair of texts, with or without class names or the name of a domain."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from llm3.config.data_schema import SourceConfig
from llm3.data.formats import BadRow, Document, bytes_of, dialogue, structure, text_of, value
from llm3.data.tokenizer import Tokenizer


def read_row(row: Mapping[str, Any], source: SourceConfig) -> dict[str, Any]:
    """{"text", "pair" if the source names one, "labels" if it names a label or a tag, "several" for a list of labels}.

    labels: distinct class names, sorted; integers and truth values become names as JSON. several: True if the label is
    a list, which may be empty, and in CSV is written as JSON. Raises BadRow.
    """
    record = read_input(row, source)
    if source.label or source.tag:
        spec = source.label or source.tag
        read = text_of if "{" in spec else structure if source.label else value
        found = read(row, spec)
        several = bool(source.label) and isinstance(found, list)
        record["labels"] = sorted({_name(each, spec) for each in (found if several else [found])})
        if several:
            record["several"] = True
    return record


def read_input(row: Mapping[str, Any], source: SourceConfig) -> dict[str, Any]:
    """As `read_row`, without labels. Raises BadRow."""
    pair = {"pair": text_of(row, source.pair)} if source.pair else {}
    return {"text": text_of(row, source.text), **pair}


def columns(source: SourceConfig) -> list[str]:
    """The fields of the text, or of both texts of a pair."""
    return [each for each in (source.text, source.pair) if each]


def encode(record: Mapping[str, Any], tokenizer: Tokenizer, template: str) -> Document:
    """[bos] text [eos], or [bos] text [eos] pair [eos]; without the first if the tokenizer has no bos.

    Running text has no turns, so the template is not used.
    """
    parts, encoded = texts(record), [tokenizer.encode(part) for part in texts(record)]
    tokens = list(tokenizer.starts)
    for part in encoded:
        tokens += [*part, tokenizer.eos_id]
    unpredicted = 0 if tokenizer.starts else tokenizer.first_bytes(parts[0], encoded[0])
    return Document(
        tokens=np.array(tokens, np.int32),
        answer_mask=None,
        text_bytes=bytes_of(parts) - unpredicted,
        labels=tuple(record.get("labels", ())),
    )


def encoded_texts(tokens: np.ndarray, tokenizer: Tokenizer) -> list[list[int]]:
    """The tokens of each of `texts(record)`, taken out of a document that `encode` made of the record."""
    tokens = tokens[len(tokenizer.starts) :]
    parts = np.split(tokens, np.flatnonzero(tokens == tokenizer.eos_id) + 1)
    return [part[:-1].tolist() for part in parts[:-1]]


def encode_prompt(record: Mapping[str, Any], tokenizer: Tokenizer, template: str) -> Document:
    """[bos] text, to be continued, or with a template the text as the user's turn. Raises BadRow."""
    if template:
        return dialogue.encode_prompt({"turns": [["user", record["text"]]]}, tokenizer, template)
    tokens = [*tokenizer.starts, *tokenizer.encode(record["text"])]
    return Document(np.array(tokens, np.int32), None, bytes_of([record["text"]]))


def texts(record: Mapping[str, Any]) -> list[str]:
    """The text, or both texts of a pair."""
    return [record[name] for name in ("text", "pair") if name in record]


def _name(label: Any, spec: str) -> str:
    if isinstance(label, str):
        return text_of({"label": label}, "label") if not spec.isidentifier() else text_of({spec: label}, spec)
    if label is None:
        raise BadRow(f"{spec} holds a null")
    if not isinstance(label, int):  # truth values are integers too
        raise BadRow(f"{spec} is of type {type(label).__name__}, not a class name")
    return json.dumps(label)

"""Row formats: how a row of a source becomes a document. A plugin is one file here; `SourceConfig.row_format` names it.

A plugin has

    read_row(row, source) -> record                      the content of a row, in plain JSON values
    encode(record, tokenizer, template) -> Document      its tokens; template: a chat template, or ""
    texts(record) -> list of str                         the texts that a tokenizer is trained on
    read_input(row, source) -> record                    the content without labels or answers, which may be missing
    columns(source) -> list of str                       the fields of the source that `read_input` reads
    encode_prompt(record, tokenizer, template) -> Document (optional)
                                                         a record of `read_input`, up to where an answer begins
    resolve(rows, source, where) -> source (optional)    the source with what only all rows together tell
    encoded_texts(tokens, tokenizer) -> lists of ids     (optional) the tokens of each of `texts(record)`, out of its
                                                         document: for other labels, nothing is tokenized again

`read_row`, `read_input` and the encoders raise BadRow for an unusable row. They depend on their arguments only, so that
a row becomes the same bytes in any process.
"""

import contextlib
import json
import string
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

START_CHARACTERS = 200  # characters of an unusable row that are kept


class BadRow(Exception):
    """An unusable row. The text is the reason; rows are counted by reason, so it names no values of the row.

    start: the beginning of the row, if known.
    """

    def __init__(self, reason: str, start: str = ""):
        super().__init__(reason)
        self.start = start[:START_CHARACTERS]


class Document(NamedTuple):
    """One row, tokenized.

    tokens: int32 [n], <bos> and the last <eos> included. answer_mask: bool [n], True at the tokens of answers; None if
    the row format marks no answers. text_bytes: UTF-8 bytes of its texts, but for those of a first token that nothing
    predicts, where there is no <bos>. labels: names of its classes (or its tag). note: plain JSON values that an
    evaluation needs besides the tokens, or None.
    """

    tokens: np.ndarray
    answer_mask: np.ndarray | None
    text_bytes: int
    labels: tuple[str, ...] = ()
    note: dict[str, Any] | None = None


def columns_of(spec: str) -> list[str]:
    """The columns of a config field: the field itself, or the columns of a template like "{question}\\n{context}"."""
    if "{" not in spec:
        return [spec]
    return [name for _, name, _, _ in string.Formatter().parse(spec) if name is not None]


def bytes_of(texts: Iterable[str]) -> int:
    """The number of UTF-8 bytes of all texts."""
    return sum(len(text.encode()) for text in texts)


def value(row: Mapping[str, Any], name: str) -> Any:
    """A column of a row. Raises BadRow if it is missing or null."""
    if name not in row:
        raise BadRow(f"no field {name!r}")
    if row[name] is None:
        raise BadRow(f"{name} is null")
    return row[name]


def structure(row: Mapping[str, Any], name: str) -> Any:
    """A column that holds a list or an object, which may be written as JSON in a text, as in a cell of CSV."""
    found = value(row, name)
    if isinstance(found, str) and found.lstrip().startswith(("[", "{")):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(found)
    return found


def text_of(row: Mapping[str, Any], spec: str) -> str:
    """The text of a config field in a row. Raises BadRow, also for a blank text."""
    texts = {name: value(row, name) for name in columns_of(spec)}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise BadRow(f"{name} is of type {type(text).__name__}, not a text")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadRow(f"{name} is not valid Unicode") from None
    text = spec.format_map(texts) if "{" in spec else texts[spec]
    if not text.strip():
        raise BadRow(f"{spec if spec in texts else ' and '.join(texts)} is empty")
    return text

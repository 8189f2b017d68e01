"""How a row of a source becomes a document. A plugin is one file here; `SourceConfig.row_format` names it.

A plugin has

    read(row, source) -> record                          what the row says, in plain values (as JSON has them)
    encode(record, tokenizer, template) -> Document      its tokens; template: of turns, "" for none
    texts(record) -> list of str                         what a tokenizer is trained on

`read` and `encode` raise BadRow for what cannot be used. They depend on nothing but their arguments, so that a row
becomes the same bytes in any process.
"""

import string
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

START_CHARACTERS = 200  # of a bad row, that are kept


class BadRow(Exception):
    """A row that cannot be used; its text is the reason, in the words by which such rows are counted.

    start: how the row begins, where that is known.
    """

    def __init__(self, reason: str, start: str = ""):
        super().__init__(reason)
        self.start = start[:START_CHARACTERS]


class Document(NamedTuple):
    """One row, tokenized.

    tokens: int32 [n], <bos> and the last <eos> included. labelled: bool [n], the tokens that an answer is made of, or
    None where all are alike. text_bytes: UTF-8 bytes of its texts. labels: names of its classes (or its tag). note:
    what an evaluation needs besides the tokens, in plain values, or None.
    """

    tokens: np.ndarray
    answer_mask: np.ndarray | None
    text_bytes: int
    labels: tuple[str, ...] = ()
    note: dict[str, Any] | None = None


def columns_of(spec: str) -> list[str]:
    """The columns that a field of the config names: itself, or those of a template like "{question}\\n{context}"."""
    if "{" not in spec:
        return [spec]
    return [name for _, name, _, _ in string.Formatter().parse(spec) if name is not None]


def bytes_of(texts: Iterable[str]) -> int:
    """The UTF-8 bytes of texts together."""
    return sum(len(text.encode()) for text in texts)


def value(row: Mapping[str, Any], name: str) -> Any:
    """A column of a row. Raises BadRow where it is missing or null."""
    if name not in row:
        raise BadRow(f"no field {name!r}")
    if row[name] is None:
        raise BadRow(f"{name} is null")
    return row[name]


def text_of(row: Mapping[str, Any], spec: str) -> str:
    """What a field of the config says of a row, a text that is not blank. Raises BadRow."""
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

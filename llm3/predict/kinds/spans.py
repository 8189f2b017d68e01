"""The answer to a question in its context, with its characters; a longer context is chunked as in training."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from llm3.data.formats import BadRow, Document
from llm3.data.tokenizer import Tokenizer
from llm3.data.windows.spans import SHORTEST
from llm3.errors import at_least
from llm3.evals import span
from llm3.predict.fields import Fields
from llm3.predict.session import Item, Session, shortest
from llm3.predict.trained import Trained

FORMATS = ("span",)
ROWS = 256


@dataclasses.dataclass(frozen=True)
class Options:
    """max_answer_tokens, no_answer_threshold: as of the evaluation `span`."""

    max_answer_tokens: int = 64
    no_answer_threshold: float = 0.0

    def __post_init__(self) -> None:
        at_least("max_answer_tokens", self.max_answer_tokens, 1)


def least_length(options: Options) -> int:
    """As the windows of spans."""
    return SHORTEST


def refusal(trained: Trained) -> str:
    """A stage without span heads has none to give."""
    return "" if trained.head == span.HEAD else "it has no task head of spans"


def read(row: dict[str, Any], fields: Fields) -> dict[str, Any]:
    """The question and the context. Raises BadRow."""
    return fields.plugin.read_input(row, fields.source)


def encode(record: dict[str, Any], fields: Fields, trained: Trained, tokenizer: Any, options: Options) -> Document:
    """The document as in training."""
    return fields.plugin.encode(record, tokenizer, trained.template)


def columns(trained: Trained, options: Options) -> dict[str, pa.DataType]:
    """answer ("": no answer), start and end (characters of the context, the end excluded), and score.

    score: the sum of the two logits, less that of "no answer".
    """
    return {"answer": pa.string(), "start": pa.int64(), "end": pa.int64(), "score": pa.float32()}


def predict(session: Session, items: Sequence[Item]) -> list[dict[str, Any] | BadRow]:
    """The answer of each row; BadRow for a question that leaves no room for a context."""
    result: list[dict[str, Any] | BadRow] = []
    for item, found in zip(items, span.best_spans(session.context(items, "spans")), strict=True):
        if not math.isfinite(found.score):
            result.append(BadRow("question is longer than half of the window"))
            continue
        score = {"score": shortest(found.score - found.none)}
        if found.answers(session.options.no_answer_threshold):
            start, end = characters(item, found.first, found.last, session.tokenizer)
            result.append({"answer": item.record["context"][start:end], "start": start, "end": end, **score})
        else:
            result.append({"answer": "", "start": None, "end": None, **score})
    return result


def characters(item: Item, first: int, last: int, tokenizer: Tokenizer) -> tuple[int, int]:
    """The characters [start, end) of the context that the tokens [first, last] of its document cover.

    A character that a token cuts is not one of them; so the text is what the tokens decode to.
    """
    assert item.document.note is not None
    before = item.document.note["context"]
    if not tokenizer.lossless:
        found = tokenizer.encode_spans([item.record["context"]])
        return found.starts[first - before], found.ends[last - before]
    lengths, tokens = tokenizer.byte_lengths, item.document.tokens
    start = int(lengths[tokens[before:first]].sum())
    content = item.record["context"].encode()
    end = start + int(lengths[tokens[first : last + 1]].sum())
    while start < len(content) and content[start] & 0xC0 == 0x80:  # within a character
        start += 1
    while end < len(content) and content[end] & 0xC0 == 0x80:
        end -= 1
    begin = len(content[:start].decode())
    return begin, max(begin, len(content[:end].decode()))

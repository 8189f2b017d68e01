"""A trained stage on its devices, and documents in memory for the windows and functions of the evaluations."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from llm3 import evals
from llm3.config.schema import EvaluationConfig, ModelConfig
from llm3.data.cache.token_cache import TokenCache
from llm3.data.formats import Document
from llm3.data.packing import Windows
from llm3.data.tokenizer import Tokenizer
from llm3.predict.fields import Fields
from llm3.predict.trained import Trained


class Item(NamedTuple):
    """A usable row. row: its number in the input, from 0. record: its content. document: its tokens."""

    row: int
    record: dict[str, Any]
    document: Document


class Documents:
    """Documents in memory, with what windows read of a `TokenCache`. None has a label; all count as class 0."""

    label_sets = None
    label_names: Sequence[str] = ()

    def __init__(self, documents: Sequence[Document], tokenizer: Tokenizer):
        self._documents = documents
        self.starts, self.eos_id = len(tokenizer.starts), tokenizer.eos_id
        self.offsets = np.cumsum([0, *(len(each.tokens) for each in documents)], dtype=np.int64)
        self.labels = np.zeros(len(documents), np.int32)

    @property
    def documents(self) -> int:
        return len(self._documents)

    def document(self, index: int) -> np.ndarray:
        """The tokens of a document: int32 [n]."""
        return self._documents[index].tokens

    def note(self, index: int) -> dict[str, Any]:
        """The note of a document; {} if it has none."""
        return self._documents[index].note or {}


class Session(NamedTuple):
    """A stage whose parameters are on the devices, as one segment. The other fields as of `evals.EvalContext`.

    length: max tokens of a window. batch_size: windows of a batch.
    """

    trained: Trained
    fields: Fields
    options: Any
    params: dict
    model: ModelConfig
    place: Callable[[Any], Any]
    compiled: evals.Compiled
    batch_size: int
    length: int

    @property
    def tokenizer(self) -> Tokenizer:
        return self.trained.tokenizer

    def context(self, items: Sequence[Item], kind: str, options: Any = None) -> evals.EvalContext:
        """The documents of the items, for the functions of an evaluation. kind: of windows."""
        documents = Documents([each.document for each in items], self.tokenizer)
        return evals.EvalContext(
            params=self.params,
            model=self.model,
            config=EvaluationConfig("predict", sequence_length=self.length, batch_size=self.batch_size),
            options=options or self.options,
            kind=kind,
            cache=cast(TokenCache, documents),
            tokenizer=self.tokenizer,
            place=self.place,
            compiled=self.compiled,
            template=self.trained.template,
        )


class Piece(NamedTuple):
    """A document, or a part of one, in a window.

    number: from 0 in its window. document: its index. first, stop: its tokens, in the document. place: int [n], their
    positions in the window. result: the result of the function for this window.
    """

    number: int
    document: int
    first: int
    stop: int
    place: np.ndarray
    result: dict[str, np.ndarray]


def pieces(
    context: evals.EvalContext, function: Callable[..., dict[str, jax.Array]], table: Windows, *arrays: Any
) -> Iterator[Piece]:
    """Yield each piece of each document, with the result of `function`, as of `EvalContext.each`, for its window."""
    for number, (batch, result) in enumerate(context.each(function, *arrays, table=table)):
        first = number * context.config.batch_size
        for row in range(min(len(batch.tokens), len(table) - first)):
            of_row = {name: value[row] for name, value in result.items()}
            for segment, document, (start, stop) in table.documents_of(first + row):
                place = np.flatnonzero(batch.segments[row] == segment)
                yield Piece(segment - 1, document, start, stop, place, of_row)


def size_class(count: int) -> int:
    """The next power of two, so that functions are compiled for few sizes."""
    return 1 << max(count - 1, 0).bit_length()


def shortest(value: Any) -> float | None:
    """A float32 as the shortest decimal number that rounds to it; None if it is not finite."""
    number = float(str(np.float32(value)))
    return number if math.isfinite(number) else None

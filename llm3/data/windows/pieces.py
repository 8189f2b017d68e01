"""Running text, cut in pieces from each document's own start."""

import numpy as np

from llm3.data.batch import Batch
from llm3.data.cache.cache import TokenCache
from llm3.data.packing import PackedWindows
from llm3.errors import at_least


class WindowTable(PackedWindows):
    """Language-model evaluation: documents cut from their own starts in pieces of at most T predictions.

    A piece is never split over windows, so the loss of a document depends on nothing but the document and T. Each
    target is counted exactly once.
    """

    def __init__(self, cache: TokenCache, length: int):
        """Raises UserError if length < 2."""
        at_least("sequence_length", length, 2)
        self._cache = cache
        predictions = np.diff(cache.offsets) - 1
        pieces = -(-predictions // length)
        self._document = np.repeat(np.arange(len(pieces)), pieces)
        first_piece = np.repeat(np.cumsum(pieces) - pieces, pieces)
        self._start = (np.arange(len(self._document)) - first_piece) * length
        sizes = np.minimum(predictions[self._document] - self._start, length)
        super().__init__(sizes, length)
        self.documents = int((pieces > 0).sum())

    def _fill(self, window: Batch, piece: int, place: slice) -> None:
        start = self._cache.offsets[self._document[piece]] + self._start[piece]
        tokens = self._cache.read_tokens(start, start + self._sizes[piece] + 1)
        window.tokens[place] = tokens[:-1]
        window.targets[place] = tokens[1:]
        window.weights[place] = 1

    def _tokens_of(self, piece: int) -> tuple[int, tuple[int, int]]:
        first = int(self._start[piece])
        return int(self._document[piece]), (first, first + int(self._sizes[piece]))

"""Running text for evaluation: each document is cut into pieces from its own start."""

import numpy as np

from llm3.data.batch import Batch
from llm3.data.cache.cache import TokenCache
from llm3.data.packing import PackedWindows
from llm3.errors import at_least


class WindowTable(PackedWindows):
    """Language-model evaluation: documents cut into pieces of at most T predictions.

    No piece is split between windows, so the loss of a document depends only on the document and T. Each token but
    <bos> is a target exactly once.
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

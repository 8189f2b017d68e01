"""Running text, cut in pieces from each document's own start."""

import numpy as np

from llm3.data.batch import Batch
from llm3.data.cache.cache import TokenCache
from llm3.data.packing import Packed, checked, empty_window, mark
from llm3.errors import at_least


class Table:
    """Language-model evaluation: documents cut from their own starts in pieces of at most T predictions.

    A piece is never split over windows, so the loss of a document depends on nothing but the document and T. Each
    target is counted exactly once.
    """

    truncated = dropped = 0

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
        self._packed = Packed(sizes, length)
        self.waste = self._packed.waste
        self.documents = int((pieces > 0).sum())

    def __len__(self) -> int:
        return len(self._packed)

    def __getitem__(self, index: int) -> Batch:
        window = empty_window(self._packed.length)
        for segment, piece, place in self._packed.layout(checked(index, self)):
            start = self._cache.offsets[self._document[piece]] + self._start[piece]
            tokens = self._cache.read(start, start + place.stop - place.start + 1)
            window.tokens[place] = tokens[:-1]
            window.targets[place] = tokens[1:]
            window.weights[place] = 1
            mark(window, place, segment)
        return window

    def documents_of(self, index: int) -> list[tuple[int, int, tuple[int, int]]]:
        """(segment, document, (first, stop) of its tokens) for each piece in the `tokens` of a window."""
        found = []
        for segment, piece, place in self._packed.layout(checked(index, self)):
            first = int(self._start[piece])
            found.append((segment, int(self._document[piece]), (first, first + place.stop - place.start)))
        return found

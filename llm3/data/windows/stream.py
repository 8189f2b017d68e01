"""Running text for training: all documents end to end, cut every T tokens."""

import numpy as np

from llm3.data.batch import Batch
from llm3.data.cache.token_cache import TokenCache
from llm3.data.packing import checked_index, empty_window, mark_segment
from llm3.errors import at_least


class WindowTable:
    """Language-model training: a stream of documents cut every T tokens; only the last window has padding.

    Every token but the first of each document is a target of weight 1 exactly once, also across window borders.
    """

    truncated = dropped = 0

    def __init__(self, cache: TokenCache, length: int):
        """Raises UserError if length < 2."""
        at_least("sequence_length", length, 2)
        self._cache, self._length = cache, length
        self._inputs = max(cache.tokens - 1, 0)  # the last token of the stream predicts nothing
        self._windows = -(-self._inputs // length)
        self.waste = 1 - self._inputs / (self._windows * length) if self._windows else 0.0
        self.documents = cache.documents

    @property
    def max_pieces(self) -> int:
        starts = np.arange(0, self._inputs, self._length)
        ends = np.minimum(starts + self._length, self._inputs)
        first, last = (np.searchsorted(self._cache.offsets, each, side="right") for each in (starts, ends - 1))
        return int((last - first).max(initial=-1)) + 1

    def __len__(self) -> int:
        return self._windows

    def __getitem__(self, index: int) -> Batch:
        start, stop, _, ends = self._layout(index)
        stream, size = self._cache.read_tokens(start, stop + 1), stop - start
        window = empty_window(self._length)
        window.tokens[:size] = stream[:-1]
        window.targets[:size] = stream[1:]
        window.weights[:size] = 1
        first = 0
        for segment, end in enumerate((ends - start).tolist(), start=1):
            mark_segment(window, slice(first, min(end, size)), segment)
            if end <= size:
                window.weights[end - 1] = 0  # a document's last token predicts nothing
            first = end
        return window

    def documents_of(self, index: int) -> list[tuple[int, int, tuple[int, int]]]:
        """(segment, document, (first, stop) of the document's tokens) for each document in a window."""
        start, stop, first, ends = self._layout(index)
        begins = self._cache.offsets[first : first + len(ends)]
        spans = zip(np.maximum(start - begins, 0).tolist(), (np.minimum(ends, stop) - begins).tolist(), strict=True)
        return [(number + 1, first + number, span) for number, span in enumerate(spans)]

    def _layout(self, index: int) -> tuple[int, int, int, np.ndarray]:
        """(start, stop, document at start, ends of the documents) of a window, in tokens of the stream."""
        start = checked_index(index, self) * self._length
        stop = min(start + self._length, self._inputs)
        first, last = np.searchsorted(self._cache.offsets, [start, stop - 1], side="right") - 1
        return start, stop, int(first), self._cache.offsets[first + 1 : last + 2]

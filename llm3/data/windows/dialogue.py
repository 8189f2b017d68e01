"""Whole documents whose answers are the only targets."""

import numpy as np

from llm3.data.batch import Batch
from llm3.data.cache.token_cache import TokenCache
from llm3.data.packing import PackedWindows
from llm3.errors import at_least


class WindowTable(PackedWindows):
    """Instruction tuning: each document lies in one window, and its targets are the tokens of its answer mask.

    A document with more than T predictions keeps the first T and counts as truncated. If no target remains, it gets no
    window and counts as dropped too.
    """

    def __init__(self, cache: TokenCache, length: int):
        """Raises UserError if length < 2."""
        at_least("sequence_length", length, 2)
        self._cache = cache
        sizes = np.diff(cache.offsets) - 1
        long = np.flatnonzero(sizes > length)
        lost = [index for index in long.tolist() if not cache.answer_mask(index)[1 : length + 1].any()]
        self.truncated, self.dropped = len(long), len(lost)
        kept = np.delete(np.arange(len(sizes)), lost)
        self.documents = len(kept)
        sizes = np.minimum(sizes[kept], length)
        super().__init__(sizes, length, kept, np.zeros_like(sizes), sizes + 1)

    def _fill(self, window: Batch, piece: int, place: slice) -> None:
        document, (_, stop) = self._tokens_of(piece)
        tokens = self._cache.document(document)[:stop]
        window.tokens[place] = tokens[:-1]
        window.targets[place] = tokens[1:]
        window.weights[place] = self._cache.answer_mask(document)[1:stop]

"""Whole documents of which only some tokens are to be learnt: the answers."""

import numpy as np

from llm3.config.schema import at_least
from llm3.data.batch import Batch
from llm3.data.cache.cache import TokenCache
from llm3.data.packing import Packed, checked, empty_window, mark


class Table:
    """Instruction tuning: each document in one window, a target at each labelled token, and nowhere else.

    A document of more than T predictions keeps the first T, and is counted in `truncated`; where no label is left, it
    is left out, and counted in `dropped` as well.
    """

    def __init__(self, cache: TokenCache, length: int):
        """Raises UserError if length < 2."""
        at_least("sequence_length", length, 2)
        self._cache = cache
        sizes = np.diff(cache.offsets) - 1
        long = np.flatnonzero(sizes > length)
        lost = [index for index in long.tolist() if not cache.answered(index)[1 : length + 1].any()]
        self.truncated, self.dropped = len(long), len(lost)
        self._documents = np.delete(np.arange(len(sizes)), lost)
        self.documents = len(self._documents)
        self._packed = Packed(np.minimum(sizes[self._documents], length), length)
        self.waste = self._packed.waste

    def __len__(self) -> int:
        return len(self._packed)

    def __getitem__(self, index: int) -> Batch:
        window = empty_window(self._packed.length)
        for segment, piece, place in self._packed.layout(checked(index, self)):
            document, stop = int(self._documents[piece]), place.stop - place.start + 1
            tokens = self._cache.document(document)[:stop]
            window.tokens[place] = tokens[:-1]
            window.targets[place] = tokens[1:]
            window.weights[place] = self._cache.answered(document)[1:stop]
            mark(window, place, segment)
        return window

    def documents_of(self, index: int) -> list[tuple[int, int, tuple[int, int]]]:
        """(segment, document, (first token, behind the last)) of each document of a window."""
        return [
            (segment, int(self._documents[piece]), (0, place.stop - place.start + 1))
            for segment, piece, place in self._packed.layout(checked(index, self))
        ]

"""Whole documents with a class label."""

import numpy as np

from llm3.data.batch import Batch
from llm3.data.cache.token_cache import TokenCache
from llm3.data.packing import PackedWindows
from llm3.errors import UserError, at_least


class WindowTable(PackedWindows):
    """Classification: whole documents; each has one target, its label, at its last token.

    A target is the index of a class, or of a set of classes if documents have several. A document longer than T keeps
    its first T - 1 tokens and its <eos>; a pair of texts is cut by `shortened`. Both count as truncated.
    """

    def __init__(self, cache: TokenCache, length: int):
        """Raises UserError if length < 3 or the cache has no labels."""
        at_least("sequence_length", length, 3)
        if cache.labels is None:
            raise UserError("classification needs a source with labels: set the source's `label` field")
        self._cache, self._labels = cache, cache.labels
        sizes = np.diff(cache.offsets)
        self.truncated = int(np.sum(sizes > length))
        self.documents = cache.documents
        sizes = np.minimum(sizes, length)
        super().__init__(sizes, length, np.arange(cache.documents), np.zeros_like(sizes), sizes)

    def _fill(self, window: Batch, piece: int, place: slice) -> None:
        window.tokens[place] = shortened(
            self._cache.document(piece), self._length, self._cache.starts, self._cache.eos_id
        )
        last = place.stop - 1
        window.targets[last] = self._labels[piece]
        window.weights[last] = 1


def shortened(tokens: np.ndarray, length: int, starts: int, eos_id: int) -> np.ndarray:
    """[bos] A [eos] or [bos] A [eos] B [eos], cut to at most `length` tokens; texts lose their last tokens.

    The longer text of a pair is cut until both are equally long, then both in turn (as the code of Devlin et al. 2019).
    starts: the number of tokens before A, 0 without a bos.
    """
    if len(tokens) <= length:
        return tokens
    middle = starts + int(np.argmax(tokens[starts:] == eos_id))
    second = len(tokens) - 2 - middle  # tokens of B
    if second < 0:
        return np.concatenate([tokens[: length - 1], tokens[-1:]])
    room = length - 2 - starts
    kept = min(second, max(room // 2, room - (middle - starts)))
    first = tokens[: starts + room - kept]
    return np.concatenate([first, tokens[middle : middle + 1 + kept], tokens[-1:]])

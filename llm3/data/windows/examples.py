"""Whole documents with a label."""

import numpy as np

from llm3.config.schema import at_least
from llm3.data.batch import Batch
from llm3.data.cache.cache import TokenCache
from llm3.data.packing import Packed, checked, empty_window, mark
from llm3.data.tokenizer import Tokenizer
from llm3.errors import UserError


class Table:
    """Classification: whole documents; the label is the target at each document's last token, and nowhere else.

    A target is a class, or the number of a set of classes where documents have several. A document longer than T keeps
    its first T - 1 tokens and its end token, a pair of texts as many of each as `shortened` says; it is counted in
    `truncated`.
    """

    dropped = 0

    def __init__(self, cache: TokenCache, length: int):
        """Raises UserError if length < 3 or the cache has no labels."""
        at_least("sequence_length", length, 3)
        if cache.labels is None:
            raise UserError("classification needs a source with labels: set its `label` field")
        self._cache, self._labels = cache, cache.labels
        sizes = np.diff(cache.offsets)
        self.truncated = int(np.sum(sizes > length))
        self.documents = cache.documents
        self._packed = Packed(np.minimum(sizes, length), length)
        self.waste, self.most = self._packed.waste, self._packed.most  # most: documents in a window

    def __len__(self) -> int:
        return len(self._packed)

    def __getitem__(self, index: int) -> Batch:
        window = empty_window(self._packed.length)
        for segment, document, place in self._packed.layout(checked(index, self)):
            window.tokens[place] = shortened(self._cache.document(document), self._packed.length)
            last = place.stop - 1
            window.targets[last] = self._labels[document]
            window.weights[last] = 1
            mark(window, place, segment)
        return window

    def documents_of(self, index: int) -> list[tuple[int, int, tuple[int, int]]]:
        """(segment, document, (0, tokens that are kept)) of the documents of a window."""
        layout = self._packed.layout(checked(index, self))
        return [(segment, document, (0, place.stop - place.start)) for segment, document, place in layout]


def shortened(tokens: np.ndarray, length: int) -> np.ndarray:
    """[bos] A [eos] or [bos] A [eos] B [eos] with at most `length` tokens, cut at the ends of the texts.

    Of a pair, the longer text is cut until both are equally long, then one after the other (Devlin et al. 2019's code).
    """
    if len(tokens) <= length:
        return tokens
    middle = int(np.argmax(tokens == Tokenizer.eos_id))
    second = len(tokens) - 2 - middle  # tokens of B
    if second < 0:
        return np.concatenate([tokens[: length - 1], tokens[-1:]])
    room = length - 3
    kept = min(second, max(room // 2, room - (middle - 1)))
    first = tokens[: 1 + room - kept]
    return np.concatenate([first, tokens[middle : middle + 1 + kept], tokens[-1:]])

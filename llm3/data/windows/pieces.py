"""Running text for evaluation: each document is cut into pieces from its own start."""

import numpy as np

from llm3.data.batch import Batch
from llm3.data.cache.token_cache import TokenCache
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
        document = np.repeat(np.arange(len(pieces)), pieces)
        first_piece = np.repeat(np.cumsum(pieces) - pieces, pieces)
        first = (np.arange(len(document)) - first_piece) * length
        sizes = np.minimum(predictions[document] - first, length)
        super().__init__(sizes, length, document, first, first + sizes)
        self.documents = int((pieces > 0).sum())

    def _fill(self, window: Batch, piece: int, place: slice) -> None:
        document, (first, stop) = self._tokens_of(piece)
        tokens = self._cache.document(document)[first : stop + 1]
        window.tokens[place] = tokens[:-1]
        window.targets[place] = tokens[1:]
        window.weights[place] = 1

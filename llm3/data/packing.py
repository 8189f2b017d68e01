"""Tables of windows over a token cache: documents packed into rows of a fixed length, by random access.

Every table has a length, gives window i as a `Batch` of arrays [T], and says what packing cost: `waste`, the share of
padded positions, and `truncated`, the number of documents that lost tokens.
"""

from typing import Protocol

import numpy as np

from llm3.config import at_least
from llm3.data.batch import Batch
from llm3.data.cache import TokenCache
from llm3.errors import UserError

PACKING_BLOCK = 16_384  # pieces that are packed together; bounds the time and memory of the packer


class Windows(Protocol):
    """What `Mixture` and `finite_batches` read."""

    waste: float
    truncated: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Batch: ...


class StreamWindows:
    """Language-model training: the documents end to end, cut every T tokens, with no padding but in the last window.

    Every token but the first of each document is a target of weight 1 exactly once, also at the borders of windows.
    """

    truncated = 0

    def __init__(self, cache: TokenCache, length: int):
        """Raises UserError if length < 2."""
        at_least("sequence_length", length, 2)
        self._cache, self._length = cache, length
        self._inputs = max(cache.tokens - 1, 0)  # the last token of all predicts nothing
        self._windows = -(-self._inputs // length)
        self.waste = 1 - self._inputs / (self._windows * length) if self._windows else 0.0

    def __len__(self) -> int:
        return self._windows

    def __getitem__(self, index: int) -> Batch:
        start = _checked(index, self) * self._length
        size = min(self._length, self._inputs - start)
        offsets = self._cache.offsets
        places = np.arange(start, start + size + 1)
        documents = np.searchsorted(offsets, places, side="right") - 1
        inside = documents[:-1]
        stream = self._cache.stream[start : start + size + 1]
        window = _empty_window(self._length)
        window.tokens[:size] = stream[:-1]
        window.targets[:size] = stream[1:]
        window.positions[:size] = places[:-1] - np.maximum(offsets[inside], start)
        window.segments[:size] = inside - inside[0] + 1
        window.weights[:size] = inside == documents[1:]
        return window


class PieceWindows:
    """Language-model evaluation: documents cut from their own starts in pieces of at most T predictions.

    A piece is never split over windows, so the loss of a document depends on nothing but the document and T. Each
    target is counted exactly once.
    """

    truncated = 0

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
        self._packed = _Packed(sizes, length)
        self.waste = self._packed.waste

    def __len__(self) -> int:
        return len(self._packed)

    def __getitem__(self, index: int) -> Batch:
        window = _empty_window(self._packed.length)
        for segment, piece, place in self._packed.layout(_checked(index, self)):
            first = self._start[piece]
            tokens = self._cache.document(self._document[piece])[first : first + place.stop - place.start + 1]
            window.tokens[place] = tokens[:-1]
            window.targets[place] = tokens[1:]
            window.weights[place] = 1
            _mark(window, place, segment)
        return window


class ExampleWindows:
    """Classification: whole documents; the label is the target at each document's last token, and nowhere else.

    A document longer than T keeps its first T - 1 tokens and its end token, and is counted in `truncated`.
    """

    def __init__(self, cache: TokenCache, length: int):
        """Raises UserError if length < 2 or the cache has no labels."""
        at_least("sequence_length", length, 2)
        if cache.labels is None:
            raise UserError("classification needs a source with labels: set its `label` field")
        self._cache, self._labels = cache, cache.labels
        sizes = np.diff(cache.offsets)
        self.truncated = int(np.sum(sizes > length))
        self._packed = _Packed(np.minimum(sizes, length), length)
        self.waste, self.most = self._packed.waste, self._packed.most  # most: documents in a window

    def __len__(self) -> int:
        return len(self._packed)

    def __getitem__(self, index: int) -> Batch:
        window = _empty_window(self._packed.length)
        for segment, document, place in self._packed.layout(_checked(index, self)):
            tokens = self._cache.document(document)
            last = place.stop - 1
            window.tokens[place.start : last] = tokens[: last - place.start]
            window.tokens[last] = tokens[-1]
            window.targets[last] = self._labels[document]
            window.weights[last] = 1
            _mark(window, place, segment)
        return window


class _Packed:
    """Which pieces lie in which window and where: two index arrays over all pieces."""

    def __init__(self, sizes: np.ndarray, length: int):
        self.length, self._sizes = length, sizes
        self._order, self._bounds = pack(sizes, length)
        self.most = int(np.diff(self._bounds).max(initial=0))
        positions = len(self) * length
        self.waste = 1 - float(sizes.sum()) / positions if positions else 0.0

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def layout(self, window: int):
        """Yield (segment from 1, piece, slice of the window) for the pieces of a window."""
        start = 0
        for segment, piece in enumerate(self._order[self._bounds[window] : self._bounds[window + 1]], start=1):
            stop = start + int(self._sizes[piece])
            yield segment, int(piece), slice(start, stop)
            start = stop


def pack(sizes: np.ndarray, capacity: int, block: int = PACKING_BLOCK) -> tuple[np.ndarray, np.ndarray]:
    """Pack pieces of 1 to `capacity` tokens into windows: best fit, longest first, within blocks of `block` pieces.

    Returns order, int64 [pieces], and bounds, int64 [windows + 1]: window w holds order[bounds[w]:bounds[w + 1]].
    Best-fit decreasing needs at most 11/9 of the fewest possible windows plus 4 (Johnson et al. 1974), for each block.
    """
    order, counts = [], []
    for start in range(0, len(sizes), block):
        for window in _best_fit(np.asarray(sizes[start : start + block]), capacity):
            order.extend(start + piece for piece in window)
            counts.append(len(window))
    return np.array(order, np.int64), np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def _best_fit(sizes: np.ndarray, capacity: int) -> list[list[int]]:
    windows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # room left -> windows
    rooms = 0  # bit r is set iff with_room[r] is not empty
    for piece in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[piece])
        enough = rooms >> size
        if enough:
            room = size + (enough & -enough).bit_length() - 1
            chosen = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, chosen = capacity, len(windows)
            windows.append([])
        windows[chosen].append(piece)
        with_room[room - size].append(chosen)
        rooms |= 1 << (room - size)
    return windows


def _empty_window(length: int) -> Batch:
    """All padding: segment 0, weight 0."""
    return Batch(*(np.zeros(length, np.float32 if field == "weights" else np.int32) for field in Batch._fields))


def _mark(window: Batch, place: slice, segment: int) -> None:
    window.segments[place] = segment
    window.positions[place] = np.arange(place.stop - place.start)


def _checked(index: int, table: Windows) -> int:
    if not 0 <= index < len(table):
        raise IndexError(f"window {index} of {len(table)}")
    return int(index)

"""Packing documents into windows of a fixed length, for the plugins in `llm3/data/windows`."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from llm3.data.batch import Batch
from llm3.errors import UserError, counted

PACKING_BLOCK = 16_384  # pieces per run of the packer; bounds its time and memory


class Windows(Protocol):
    """The interface that `Mixture` and `finite_batches` read; `llm3.data.windows` explains the attributes."""

    waste: float
    truncated: int
    dropped: int
    documents: int

    @property
    def max_pieces(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Batch: ...

    def documents_of(self, index: int) -> list[tuple[int, int, tuple[int, int]]]: ...


class PackedWindows(ABC):
    """Windows packed with pieces of documents, none of them split. A subclass defines the pieces.

    sizes: int [pieces], positions of each piece, at most `length`. document, first, stop: int [pieces]; a piece has the
    tokens [first, stop) of its document. A subclass sets `documents`, and `truncated` and `dropped` if they are not 0.
    """

    documents: int
    truncated = dropped = 0

    def __init__(self, sizes: np.ndarray, length: int, document: np.ndarray, first: np.ndarray, stop: np.ndarray):
        self._length, self._sizes = length, sizes
        self._document, self._first, self._stop = document, first, stop
        self._order, self._bounds = pack(sizes, length)
        self.max_pieces = int(np.diff(self._bounds).max(initial=0))
        positions = len(self) * length
        self.waste = 1 - float(sizes.sum()) / positions if positions else 0.0

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index: int) -> Batch:
        window = empty_window(self._length)
        for segment, piece, place in self._layout(index):
            self._fill(window, piece, place)
            mark_segment(window, place, segment)
        return window

    def documents_of(self, index: int) -> list[tuple[int, int, tuple[int, int]]]:
        """(segment, document, (first, stop) of the document's tokens) for each piece in a window."""
        return [(segment, *self._tokens_of(piece)) for segment, piece, _ in self._layout(index)]

    def _layout(self, index: int) -> Iterator[tuple[int, int, slice]]:
        """Yield (segment from 1, piece, slice of the window) for the pieces of a window. Raises IndexError."""
        index, start = checked_index(index, self), 0
        for segment, piece in enumerate(self._order[self._bounds[index] : self._bounds[index + 1]].tolist(), start=1):
            stop = start + int(self._sizes[piece])
            yield segment, piece, slice(start, stop)
            start = stop

    @abstractmethod
    def _fill(self, window: Batch, piece: int, place: slice) -> None:
        """Write tokens, targets and weights of a piece into its slice of the window."""

    def _tokens_of(self, piece: int) -> tuple[int, tuple[int, int]]:
        """(document, (first, stop) of its tokens) of a piece."""
        return int(self._document[piece]), (int(self._first[piece]), int(self._stop[piece]))


def check_windows(table: Windows, where: str, length: int) -> Windows:
    """The table. Raises UserError, starting with `where`, if no document fits into a window of `length` tokens."""
    if not len(table):
        raise UserError(
            f"{where}: none of its {counted(table.dropped or table.documents, 'document')} has a target within "
            f"{length:,} tokens: expected a larger sequence_length"
        )
    return table


def pack(sizes: np.ndarray, capacity: int, block: int = PACKING_BLOCK) -> tuple[np.ndarray, np.ndarray]:
    """Pack pieces of 1 to `capacity` tokens into windows: best fit, longest first, within blocks of `block` pieces.

    Returns order, int64 [pieces], and bounds, int64 [windows + 1]: window w holds order[bounds[w]:bounds[w + 1]].
    Best-fit decreasing needs at most 11/9 of the fewest possible windows plus 4 (Johnson et al. 1974), for each block.
    """
    order: list[int] = []
    counts: list[int] = []
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


def empty_window(length: int) -> Batch:
    """A window of padding: arrays [length] of zeros."""
    return Batch(*(np.zeros(length, np.float32 if field == "weights" else np.int32) for field in Batch._fields))


def mark_segment(window: Batch, place: slice, segment: int) -> None:
    """Make a slice of a window one segment, with positions from 0."""
    window.segments[place] = segment
    window.positions[place] = np.arange(place.stop - place.start)


def checked_index(index: int, table: Windows) -> int:
    """The index as an int. Raises IndexError if the table has no such window."""
    if not 0 <= index < len(table):
        raise IndexError(f"window {index} of {len(table)}")
    return int(index)

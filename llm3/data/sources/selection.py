"""Selecting rows by a hash of their text: rows held out for validation, and fixed samples."""

import dataclasses
import hashlib
import heapq
import itertools
from collections.abc import Iterable, Iterator

import numpy as np

ROWS_AT_A_TIME = 1 << 16  # rows whose hashes are compared at once


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """One side of a split by hash: `share` of the texts are for validation. Equal texts are on the same side."""

    share: float
    validation: bool

    def takes(self, digest: int) -> bool:
        """Whether a text with this hash is on this side."""
        return (float(digest) < self.share * 2.0**64) == self.validation


def hash_of(text: str) -> int:
    """The first 64 bits of the text's sha256."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def sample_threshold(rows: Iterable[tuple[int, int]], count: int) -> tuple[int, int] | None:
    """The `count`-th smallest (hash, row number), in memory for `count` rows; None if there are no more rows."""
    rows = iter(rows)
    kept = np.empty((0, 2), np.uint64)
    seen = 0
    while block := list(itertools.islice(rows, max(count, ROWS_AT_A_TIME))):
        seen += len(block)
        numbers = np.fromiter(itertools.chain.from_iterable(block), np.uint64, 2 * len(block))
        kept = np.concatenate([kept, numbers.reshape(-1, 2)])
        kept = kept[np.lexsort(kept.T[::-1])[:count]]
    return (int(kept[-1, 0]), int(kept[-1, 1])) if seen > count else None


def sample_texts(texts: Iterable[str], most_bytes: int) -> Iterator[str]:
    """At most `most_bytes` of the texts: those with the smallest hashes, in their order, in memory for them only."""
    kept: list[tuple[int, int, str]] = []
    size = 0
    for number, text in enumerate(texts):
        heapq.heappush(kept, (-hash_of(text), -number, text))
        size += len(text.encode())
        while size > most_bytes and len(kept) > 1:
            size -= len(heapq.heappop(kept)[2].encode())
    yield from (text for _, _, text in sorted(kept, key=lambda each: -each[1]))

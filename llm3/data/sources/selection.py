"""Selecting rows by a hash of their text: rows held out for validation, and fixed samples."""

import dataclasses
import hashlib
import heapq
import itertools
from collections.abc import Collection, Iterable, Iterator

import numpy as np

ROWS_AT_A_TIME = 1 << 16  # rows whose hashes are compared at once


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """One side of a split by hash: `share` of the texts are for validation. Equal texts are on the same side.

    by_class: each class that has two or more texts is on both sides, see `moved`.
    """

    share: float
    validation: bool
    by_class: bool = False

    def takes(self, digest: int, moved: Collection[int] = ()) -> bool:
        """Whether a text with this hash is on this side. moved: hashes of the texts that change sides."""
        return (self._below(digest) != (digest in moved)) == self.validation

    def moved(self, texts: Iterable[tuple[int, Iterable[str]]]) -> frozenset[int]:
        """Hashes of the texts that change sides, so that each class is on both. texts: (hash, classes), all of them.

        A class whose texts are all for validation gives the greatest hash to training, also if it has only one text. A
        class whose texts are all for training gives the smallest to validation, unless it has only one text, or that
        is the only training text of another class.
        """
        least: dict[str, tuple[int, frozenset[str]]] = {}
        greatest: dict[str, list[int]] = {}  # the greatest hash and the one before it
        for digest, classes in texts:
            for name in (names := frozenset(classes)):
                least[name] = min(least.get(name, (digest, names)), (digest, names), key=lambda each: each[0])
                greatest[name] = sorted({*greatest.get(name, ()), digest}, reverse=True)[:2]
        moved = set()
        for name, (digest, names) in least.items():
            if self._below(greatest[name][0]):
                moved.add(greatest[name][0])
            elif not self._below(digest) and not any(self._needs(digest, greatest[each]) for each in names):
                moved.add(digest)
        return frozenset(moved)

    def _needs(self, digest: int, greatest: list[int]) -> bool:
        """Whether a class with these greatest hashes has no other text for training."""
        return greatest[0] == digest and (len(greatest) == 1 or self._below(greatest[1]))

    def _below(self, digest: int) -> bool:
        return float(digest) < self.share * 2.0**64


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

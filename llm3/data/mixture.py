"""Batches: a weighted mixture of window tables for training, and each window once for evaluation."""

import collections
import concurrent.futures
import hashlib
import math
from collections.abc import Callable, Iterator
from typing import TypeVar

import grain
import numpy as np

from llm3.config import at_least
from llm3.data.batch import Batch
from llm3.data.packing import Windows
from llm3.errors import UserError, nearest

T = TypeVar("T")


class Mixture:
    """An endless, shuffled, weighted mixture: `batch` is a pure function of the tables, weights, seed and step.

    Weights are shares of the tokens (positions that are not padding), so a table that packing leaves emptier is drawn
    more often; they are kept to within half a percent of the smallest. Each table is reshuffled in every epoch,
    with a memory that does not grow with it.
    """

    def __init__(self, windows: dict[str, Windows], weights: dict[str, float], batch_size: int, seed: int):
        """Raises UserError for a weight that is not positive, a name without a table, and a table with no windows."""
        at_least("batch_size", batch_size, 1)
        if not weights:
            raise UserError("data: expected at least one source with a weight")
        for name, weight in weights.items():
            if name not in windows:
                raise UserError(f"data: unknown source {name!r}: {nearest(name, windows)}")
            if not (weight > 0 and math.isfinite(weight)):
                raise UserError(f"data: {name} has weight {weight!r}; expected a positive number (or leave it out)")
            if not len(windows[name]):
                raise UserError(f"data: {name} has no windows: its source is empty")
        self._batch_size = batch_size
        self._windows = {name: windows[name] for name in sorted(weights)}
        draws = {name: weights[name] / (1 - table.waste) for name, table in self._windows.items()}
        # grain rounds proportions down to whole hundredths of the smallest; these it takes as they are.
        rounded = {name: round(100 * draw / min(draws.values())) for name, draw in draws.items()}
        self._shares = {name: draw / sum(rounded.values()) for name, draw in rounded.items()}
        self._rows = grain.MapDataset.mix(
            [
                grain.MapDataset.source(table).seed(_seed(seed, name)).shuffle().repeat()
                for name, table in self._windows.items()
            ],
            list(rounded.values()),
        )

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """The rows `rows` of the global batch of a step, arrays [rows, T]; a host asks for its own rows only."""
        first = step * self._batch_size
        return _stack([self._rows[first + row] for row in range(self._batch_size)[rows]])

    def epochs(self, step: int) -> dict[str, float]:
        """How many times each table has been gone through after `step` batches (to within one window)."""
        drawn = step * self._batch_size
        return {name: drawn * self._shares[name] / len(table) for name, table in self._windows.items()}


def finite_batches(windows: Windows, batch_size: int) -> Iterator[Batch]:
    """Each window exactly once, in order, arrays [batch_size, T]; the last batch is filled with padding rows."""
    at_least("batch_size", batch_size, 1)
    for start in range(0, len(windows), batch_size):
        rows = [windows[index] for index in range(start, min(start + batch_size, len(windows)))]
        padding = Batch(*(np.zeros_like(field) for field in rows[0]))
        yield _stack(rows + [padding] * (batch_size - len(rows)))


def prefetch(make: Callable[[int], T], start: int, stop: int, depth: int = 2) -> Iterator[T]:
    """Yield make(start), ..., make(stop - 1), up to `depth` of them made ahead by a thread.

    What `make` raises is raised here. The thread ends with the iterator, also when its consumer stops early.
    """
    at_least("prefetch depth", depth, 1)
    thread = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
    try:
        ahead = collections.deque(thread.submit(make, step) for step in range(start, min(start + depth, stop)))
        for step in range(start + depth, stop + depth):
            made = ahead.popleft().result()
            if step < stop:
                ahead.append(thread.submit(make, step))
            yield made
    finally:
        thread.shutdown(wait=True, cancel_futures=True)


def _stack(rows: list[Batch]) -> Batch:
    return Batch(*(np.stack(field) for field in zip(*rows, strict=True)))


def _seed(seed: int, name: str) -> int:
    """A seed of 32 bits that depends on the name, so that adding a source leaves the order of the others alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big")

"""Batches: a weighted mixture of sources for training, and each window once for evaluation."""

import bisect
import collections
import concurrent.futures
import hashlib
import itertools
import math
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import grain
import numpy as np

from llm3.data.batch import Batch
from llm3.data.packing import Windows
from llm3.errors import UserError, at_least, nearest, one_of

T = TypeVar("T")
Schedule = list[tuple[int, dict[str, float]]]  # (first step, {source: weight}) of each phase


class _Phase(NamedTuple):
    """A range of rows in which the shares of the sources are constant."""

    first: int  # number of the first row, counted over all batches from step 0
    shares: dict[str, int]  # source -> its share, an integer
    before: dict[str, int]  # source -> rows drawn from it before this phase


class _Run(NamedTuple):
    """A range of steps whose batches have one size and follow one another."""

    first: int  # its first step, from 0
    row: int  # number of the first row of that step
    size: int  # rows of a batch


class Mixture:
    """An endless, shuffled, weighted mixture: `batch` is a pure function of windows, schedule, seed and step.

    Weights are shares of tokens (positions that are not padding) or of documents, kept to within half a percent: a
    source whose windows hold fewer tokens is drawn more often. Each source is reshuffled in every epoch, in constant
    memory, and continues where it was when the weights change.
    """

    def __init__(
        self,
        windows: Mapping[str, Windows],
        schedule: Schedule,
        batch_size: int,
        seed: int,
        *,
        by: str = "tokens",
        corrupt: Callable[[Batch, np.random.Generator], Batch] | None = None,
        sizes: Sequence[tuple[int, int]] = (),
        skip: Sequence[tuple[int, int]] = (),
    ):
        """schedule: [(first step, {source: weight}), ...], the first at step 0. by: "tokens" or "documents".

        sizes: [(first step, batch size), ...], sizes that replace the earlier ones. skip: [(step, batches), ...]:
        before these steps, so many batches are left out. Steps are counted from 0.
        corrupt: applied to each window; its random numbers depend only on seed, step and row, so they are the same on
        any number of hosts. Raises UserError for steps that do not ascend from 0, a weight that is not positive, an
        unknown source, and a source without windows.
        """
        at_least("batch_size", batch_size, 1)
        one_of("weights", by, ("tokens", "documents"))
        for _, size in sizes:
            at_least("batch_size", size, 1)
        steps = [step for step, _ in schedule]
        if steps[:1] != [0] or any(later <= earlier for earlier, later in itertools.pairwise(steps)):
            raise UserError(f"data: weights from the steps {steps}; expected ascending steps, the first 0")
        for _, weights in schedule:
            check_weights(weights, windows, "data")
        names = sorted({name for _, weights in schedule for name in weights})
        for name in names:
            if not len(windows[name]):
                raise UserError(f"data: {name} has no windows")
        self._runs, self._corrupt = _runs([(0, batch_size), *sizes], skip), corrupt
        self._key = int.from_bytes(hashlib.sha256(f"{seed}/corrupt".encode()).digest()[:16], "big")
        self._windows = {name: windows[name] for name in names}
        self._orders = {
            name: grain.MapDataset.range(len(table)).seed(_seed(seed, name)).shuffle().repeat()
            for name, table in self._windows.items()
        }
        self._phases = [_Phase(0, {}, dict.fromkeys(names, 0))]
        for step, weights in schedule:
            first = self._first_row(step)
            self._phases.append(_Phase(first, _shares(weights, self._windows, by), self._drawn(first)))

    def batch(self, step: int, rows: Sequence[int] | None = None) -> Batch:
        """Rows (default: all) of the global batch of a step: arrays [rows, T]. A host asks for its own rows only."""
        rows = range(self.batch_size(step)) if rows is None else rows
        windows = [self._windows[name][index] for name, index in self.origins(step, rows)]
        if self._corrupt is not None:
            windows = [self._corrupt(each, self._random(step, row)) for each, row in zip(windows, rows, strict=True)]
        return _stack(windows)

    def origins(self, step: int, rows: Sequence[int] | None = None) -> list[tuple[str, int]]:
        """(source, index of its window) of the given rows (default: all) of the global batch."""
        rows, first = range(self.batch_size(step)) if rows is None else rows, self._first_row(step)
        return [self._origin(first + row) for row in rows]

    def batch_size(self, step: int) -> int:
        """The number of rows in the batch of a step."""
        return self._run(step).size

    def draws(self, step: int) -> dict[str, int]:
        """{source: rows drawn from it in the batches before `step`, with those that were left out}."""
        return self._drawn(self._first_row(step))

    def epochs(self, step: int) -> dict[str, float]:
        """{source: epochs of it in the batches before `step`, with those that were left out}."""
        return {name: count / len(self._windows[name]) for name, count in self.draws(step).items()}

    def _run(self, step: int) -> _Run:
        return self._runs[bisect.bisect_right(self._runs, step, key=lambda run: run.first) - 1]

    def _first_row(self, step: int) -> int:
        run = self._run(step)
        return run.row + (step - run.first) * run.size

    def _origin(self, row: int) -> tuple[str, int]:
        phase = self._phase(row)
        name, number = _pick(phase.shares, row - phase.first)
        return name, self._orders[name][phase.before[name] + number]

    def _drawn(self, row: int) -> dict[str, int]:
        phase = self._phase(row)
        return phase.before | {
            name: phase.before[name] + count for name, count in _counts(phase.shares, row - phase.first).items()
        }

    def _phase(self, row: int) -> _Phase:
        return self._phases[bisect.bisect_right(self._phases, row, key=lambda phase: phase.first) - 1]

    def _random(self, step: int, row: int) -> np.random.Generator:
        # Drawing advances the lowest words of the counter.
        return np.random.Generator(np.random.Philox(key=self._key, counter=[0, 0, row, step]))


def _runs(sizes: Sequence[tuple[int, int]], skip: Sequence[tuple[int, int]]) -> list[_Run]:
    """The runs of steps between changes of the batch size and batches that are left out, as in `Mixture`."""
    size, left_out = dict(sizes), dict(skip)
    runs = [_Run(0, 0, size[0])]
    for step in sorted({*size, *left_out}):
        last, rows = runs[-1], size.get(step, runs[-1].size)
        row = last.row + (step - last.first) * last.size + left_out.get(step, 0) * rows
        runs[-1 if step == last.first else len(runs) :] = [_Run(step, row, rows)]
    return runs


def check_weights(weights: Mapping[str, float], sources: Collection[str], where: str) -> None:
    """Raise UserError, starting with `where`, unless each weight is a positive number for a known source."""
    if not weights:
        raise UserError(f"{where}: names no source; expected at least one source, as {{source: weight}}")
    for name, weight in weights.items():
        if name not in sources:
            raise UserError(f"{where}: unknown source {name!r}: {nearest(name, sources)}")
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not (number and weight > 0 and math.isfinite(weight)):
            raise UserError(
                f"{where}: {name} has weight {weight!r}; expected a number above 0 (to drop a source, remove its entry)"
            )


def _shares(weights: dict[str, float], windows: Mapping[str, Windows], by: str) -> dict[str, int]:
    """Rows drawn from each source per hundred rows of the source that is drawn least."""
    draws = {}
    for name in sorted(weights):
        table = windows[name]
        filled = 1 - table.waste if by == "tokens" else table.documents / len(table)
        draws[name] = weights[name] / filled
    return {name: round(100 * draw / min(draws.values())) for name, draw in draws.items()}


def _counts(shares: dict[str, int], rows: int) -> dict[str, int]:
    """How many of the first `rows` rows come from each source.

    As in `grain.MapDataset.mix`, the shares of all later sources are rounded down, and a source takes the remainder.
    """
    counts, left = {}, sum(shares.values())
    for name, share in shares.items():
        later = rows * (left - share) // left
        counts[name], rows, left = rows - later, later, left - share
    return counts


def _pick(shares: dict[str, int], row: int) -> tuple[str, int]:
    """The source of a row (from 0), and how many earlier rows come from that source."""
    before, after = _counts(shares, row), _counts(shares, row + 1)
    return next((name, count) for name, count in before.items() if count < after[name])


def finite_batches(windows: Windows, batch_size: int) -> Iterator[Batch]:
    """Each window exactly once, in order: arrays [batch_size, T]. Padding rows fill the last batch."""
    at_least("batch_size", batch_size, 1)
    for number in range(-(-len(windows) // batch_size)):
        yield finite_batch(windows, batch_size, number)


def finite_batch(windows: Windows, batch_size: int, number: int, rows: Sequence[int] | None = None) -> Batch:
    """Batch `number` of `finite_batches`; rows: only these rows of it, [len(rows), T]."""
    first = number * batch_size
    indices = [first + row for row in (range(batch_size) if rows is None else rows)]
    read = {index: windows[index] for index in indices if index < len(windows)}
    padding = Batch(*(np.zeros_like(field) for field in (next(iter(read.values()), None) or windows[first])))
    return _stack([read.get(index, padding) for index in indices])


def prefetch(make: Callable[[int], T], start: int, stop: int, depth: int = 2) -> Generator[T, None, None]:
    """Yield make(start), ..., make(stop - 1); a thread makes up to `depth` of them ahead.

    Exceptions of `make` are raised here. The thread ends with the iterator, also if its consumer stops early.
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
    """A 32-bit seed that depends on the name, so that a new source does not change the order of the others."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big")

"""Wall time by part: where the time of a stage goes, besides the steps themselves."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

PARTS = ("tokenize", "prepare", "compile", "train", "evaluate", "save")


class Stopwatch:
    """Wall seconds by part. Parts nest: the time of an inner part is not counted in the outer one."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._open: list[str] = []
        self._since = clock()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time of this context as `name`, one of PARTS."""
        self._settle()
        self._open.append(name)
        try:
            yield
        finally:
            self._settle()
            self._open.pop()

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add what was spent before."""
        for name, value in seconds.items():
            self._seconds[name] = self._seconds.get(name, 0.0) + value

    @property
    def seconds(self) -> dict[str, float]:
        """{part: seconds so far}, the parts that are still open included, in the order of PARTS."""
        self._settle()
        return {name: self._seconds[name] for name in PARTS if name in self._seconds}

    def _settle(self) -> None:
        now = self._clock()
        if self._open:
            self.add({self._open[-1]: now - self._since})
        self._since = now

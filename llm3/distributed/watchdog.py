"""Detects a hanging step, read, evaluation or save, reports where it is and which process is late, and ends the run."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from llm3.distributed import ending, processes
from llm3.errors import Exit

PHASES = ("reading data", "computing", "evaluating", "sampling", "saving")  # the phases of a step, in this order
GRACE_SECONDS = 20.0  # time for the other processes to report their position


class Place(NamedTuple):
    """The position of a process in its stage, and for how many seconds it has been there."""

    step: int
    phase: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.phase} of step {self.step} for {self.seconds:.0f} s"


def late(places: dict[int, Place]) -> list[int]:
    """The processes behind the others; none if all are at the same position."""
    progress = {process: (place.step, PHASES.index(place.phase)) for process, place in places.items()}
    behind = [process for process, each in progress.items() if each == min(progress.values())]
    return sorted(behind) if len(behind) < len(progress) else []


class Watchdog:
    """Ends the process with `Exit.HUNG` if one phase of a step takes longer than `seconds` (0: never).

    Every process then writes its thread stacks and the known positions of the other processes to stderr.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._at: tuple[int, str, float] | None = None
        self._ended = threading.Event()

    def at(self, step: int, phase: str) -> None:
        """Record that the main thread enters this phase of a step."""
        self._at = (step, phase, time.monotonic())

    @contextmanager
    def watching(self) -> Iterator["Watchdog"]:
        """Watch while this context lasts."""
        self._ended.clear()
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if self._seconds:
            thread.start()
        try:
            yield self
        finally:
            self._at = None
            self._ended.set()
            if self._seconds:
                thread.join()

    def place(self) -> Place | None:
        """The position of the main thread; None before the first step."""
        if self._at is None:
            return None
        step, phase, since = self._at
        return Place(step, phase, time.monotonic() - since)

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self._seconds / 4)):
            place = self.place()
            if place is None:
                continue
            if place.seconds > self._seconds:
                self._end(place, f"longer than hang_seconds={self._seconds:g}")
            processes.publish("place", place)
            if processes.published("hung"):
                self._end(place, "another process has reported that it hangs")

    def _end(self, place: Place, why: str) -> None:
        report = [f"process {processes.index()} of {processes.count()}: {place}: {why}"]
        processes.publish("hung", place)
        known = processes.published("place") | processes.published("hung")  # one may hang before its first "place"
        others = {process: Place(*each) for process, each in known.items()}
        others[processes.index()] = place
        if processes.count() > 1:
            report += [f"  process {process}: {each}" for process, each in sorted(others.items())]
            names = ", ".join(f"process {process}" for process in late(others))
            report += [f"late: {names or 'none, so a device or the network hangs'}"]
        print("\n".join(f"llm3: {line}" for line in report), file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        sys.stderr.flush()
        ending.leave_together(GRACE_SECONDS)
        os._exit(Exit.HUNG)

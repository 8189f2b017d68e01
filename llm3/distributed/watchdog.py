"""Notices a step, a read of data or a save that hangs, says where and who is late, and ends the run."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from llm3.distributed import processes
from llm3.errors import Exit

PHASES = ("reading data", "computing", "saving")  # of a step, in this order
GRACE_SECONDS = 20.0  # for the other processes to say where they are
LAST_SECONDS = 2.0


class Place(NamedTuple):
    """Where a process is in its stage, and since how many seconds."""

    step: int
    phase: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.phase} of step {self.step} for {self.seconds:.0f} s"


def late(places: dict[int, Place]) -> list[int]:
    """The processes that are behind the others; none where all are at the same place."""
    progress = {process: (place.step, PHASES.index(place.phase)) for process, place in places.items()}
    behind = [process for process, each in progress.items() if each == min(progress.values())]
    return sorted(behind) if len(behind) < len(progress) else []


class Watchdog:
    """Ends the process with `Exit.HUNG` where one phase of a step takes longer than `seconds` (0: never).

    Then every process writes the stacks of its threads to stderr, and what it knows of where the others are.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._at: tuple[int, str, float] | None = None
        self._ended = threading.Event()

    def at(self, step: int, phase: str) -> None:
        """From now on, the main thread is in this phase of a step."""
        self._at = (step, phase, time.monotonic())

    @contextmanager
    def watching(self) -> Iterator["Watchdog"]:
        """Watch for as long as this context lasts."""
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
        """Where the main thread is."""
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
                self._end(place, "another process has noticed that it hangs")

    def _end(self, place: Place, why: str) -> None:
        say = [f"process {processes.index()} of {processes.count()}: {place}: {why}"]
        processes.publish("hung", place)
        others = {process: Place(*each) for process, each in processes.published("place").items()}
        others[processes.index()] = place
        if processes.count() > 1:
            say += [f"  process {process}: {each}" for process, each in sorted(others.items())]
            names = ", ".join(f"process {process}" for process in late(others))
            say += [f"late: {names or 'no process more than the others: a device, or the network between them'}"]
        print("\n".join(f"llm3: {line}" for line in say), file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        sys.stderr.flush()
        if processes.count() > 1:
            self._wait_for_others()
        os._exit(Exit.HUNG)

    def _wait_for_others(self) -> None:
        """Who ends takes the others with it: not before they have said where they are, and the first one last."""
        processes.publish("said", True)
        until = time.monotonic() + GRACE_SECONDS
        while len(processes.published("said")) < processes.count() and time.monotonic() < until:
            time.sleep(0.1)
        time.sleep(LAST_SECONDS * processes.is_first())

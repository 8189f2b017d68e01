"""Detects a hang in any part of a run, reports where it is and which process is late, and ends the run."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from llm3.distributed import ending, processes
from llm3.errors import Exit, to_stderr

# {phase of a stage, in this order: its kind in `hang_limits`}
PHASES = {
    "waiting for the others": "wait",
    "loading": "load",
    "compiling": "compile",
    "reading data": "read",
    "computing": "compute",
    "evaluating": "evaluate",
    "sampling": "sample",
    "saving": "save",
    "loading the result": "load",
    "evaluating the result": "evaluate",
}
# Seconds, where the config has no other limit: what is read and compiled at once may take longer than a step.
LIMITS = {"wait": 3600.0, "load": 3600.0, "compile": 3600.0}
GRACE_SECONDS = 20.0  # time for the other processes to report their position


class Place(NamedTuple):
    """The position of a process in its stage, and for how many seconds it has been there. stage: counted from 1."""

    step: int
    phase: str
    seconds: float
    stage: int = 1

    def __str__(self) -> str:
        return f"{self.phase} of step {self.step} for {self.seconds:.0f} s"


def late(places: dict[int, Place]) -> list[int]:
    """The processes behind the others; none if all are at the same position."""
    order = list(PHASES)
    progress = {process: (at.stage, at.step, order.index(at.phase)) for process, at in places.items()}
    behind = [process for process, each in progress.items() if each == min(progress.values())]
    return sorted(behind) if len(behind) < len(progress) else []


class Watchdog:
    """Ends the process with `Exit.HUNG` if one phase takes longer than its limit.

    seconds: the limit of a phase. limits: {kind of phase: its own limit}. 0: never. Every process then writes its
    thread stacks and the known positions of the other processes to stderr.
    """

    def __init__(self, seconds: float, limits: Mapping[str, float] | None = None):
        given = limits or {}
        kinds = dict.fromkeys(PHASES.values(), seconds)
        longer = {kind: max(seconds, limit) for kind, limit in LIMITS.items() if seconds}
        self._limits = kinds | longer | dict(given)
        self._given = {*given, *longer}
        self._at: tuple[int, int, str, float] | None = None
        self._stage = 0
        self._lost = False  # whether the coordinator has failed to answer
        self._ended = threading.Event()

    def begin_stage(self) -> None:
        """Record that the next stage begins: its steps are counted from 0 again."""
        self._stage += 1

    def at(self, step: int, phase: str) -> None:
        """Record that the main thread enters this phase of a step."""
        self._at = (self._stage, step, phase, time.monotonic())

    def alive(self) -> None:
        """Record that the phase goes on: its limit counts from now."""
        if (at := self._at) is not None:
            self._at = (*at[:3], time.monotonic())

    def rest(self) -> None:
        """Record that the main thread has left all phases."""
        self._at = None

    @contextmanager
    def watching(self) -> Iterator["Watchdog"]:
        """Watch while this context lasts."""
        self._ended.clear()
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        limited = any(self._limits.values())
        if limited:
            thread.start()
        try:
            yield self
        finally:
            self._at = None
            self._ended.set()
            if limited:
                thread.join()

    def place(self) -> Place | None:
        """The position of the main thread; None before the first phase."""
        if self._at is None:
            return None
        stage, step, phase, since = self._at
        return Place(step, phase, time.monotonic() - since, stage)

    def _watch(self) -> None:
        shortest = min(limit for limit in self._limits.values() if limit)
        while not self._ended.wait(min(1.0, shortest / 4)):
            place = self.place()
            if place is None:
                continue
            kind = PHASES[place.phase]
            if 0 < self._limits[kind] < place.seconds:
                name = f"hang_limits.{kind}" if kind in self._given else "hang_seconds"
                self._end(place, f"longer than {name}={self._limits[kind]:g}")
            self._publish("place", place)
            if self._published("hung"):
                self._end(place, "another process has reported that it hangs")

    def _publish(self, name: str, place: Place) -> None:
        try:
            processes.publish(name, place)
        except Exception as error:  # this process is watched all the same
            if not self._lost:
                to_stderr(f"llm3: the watchdog of process {processes.index()} cannot reach the others: {error}")
            self._lost = True

    def _published(self, name: str) -> dict[int, Any]:
        try:
            return processes.published(name)
        except Exception:  # said by `_publish`
            return {}

    def _end(self, place: Place, why: str) -> None:
        report = [f"process {processes.index()} of {processes.count()}: {place}: {why}"]
        self._publish("hung", place)
        known = self._published("place") | self._published("hung")  # one may hang before its first "place"
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

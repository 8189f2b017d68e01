"""Ctrl-C and the signals of a scheduler while a stage trains: it saves at the next step boundary and ends.

With several processes, all of them stop for the signal that one of them gets. jax has a service for that, which hears
of SIGTERM alone, and only between steps; here it is switched off (see `processes.start`).
"""

import math
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress

from llm3.distributed import interrupts, processes

POLL_SECONDS = 0.5  # how soon a process hears of the signal of another one
AGREE_SECONDS = 30.0  # for all processes to say where they are; a thread does, so a step may take longer


class StopRequest:
    """Set by the first signal in a training loop, which then saves at the next step boundary and ends.

    signal: the number, once it is time to stop. steps: how often `at_step` was called; equal on all processes. done:
    steps of the stage that are done.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.steps = self.done = 0
        self._loops = 0  # twice the number of loops that have ended, and 1 more inside of one
        self._agreed: tuple[int, float] | None = None  # the signal that all stop for, and after how many steps
        self._agreeing = threading.Lock()  # held while no step may be counted

    def at_step(self) -> bool:
        """Whether to stop after this step; call it once per step. All processes get the same answer."""
        with self._agreeing:
            self.steps, self.done = self.steps + 1, self.done + 1
            if self._agreed is not None and self.steps >= self._agreed[1]:
                self.signal = self._agreed[0]
        return self.signal is not None

    @contextmanager
    def listening(self, done: int = 0) -> Iterator[None]:
        """While this context lasts, the first signal sets `signal`. Elsewhere it ends the run at once.

        done: the steps of the stage that are done.
        """
        watched = interrupts.current()
        if watched is None:
            yield
            return
        self.done, watched.step, watched.trains = done, self._step, True
        if processes.count() == 1:
            watched.stop = self._stop
        with self._agreeing:
            self._loops += 1
        try:
            yield
        finally:
            watched.trains = False
            if processes.count() == 1:
                watched.stop = None
            with self._agreeing:
                self._loops += 1
                agreed = self._agreed
            if agreed is not None and self.signal is None:  # the loop has ended before that step
                if math.isinf(agreed[1]):
                    watched.interrupt(agreed[0])
                else:
                    self.signal = agreed[0]

    def _step(self) -> str:
        """The last step before a stop."""
        return f"step {self.done + 1}" if processes.count() == 1 else "the next step of all processes"

    def _stop(self, number: int) -> None:
        self.signal = number

    @contextmanager
    def shared(self, watched: interrupts.Interrupts) -> Iterator[None]:
        """Stop for the signals of all processes while this context lasts; all of them enter it."""
        ended = threading.Event()
        watched.stop = lambda number: None  # until it is agreed on
        watched.heard = lambda number: processes.publish_once("stop", number)
        thread = threading.Thread(target=self._hear, args=(watched, ended), name="preemption", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            watched.stop, watched.heard = None, lambda number: None
            thread.join()

    def _hear(self, watched: interrupts.Interrupts, ended: threading.Event) -> None:
        """Wait for the signal of any process, and agree with all others on when to stop for it."""
        number: int | None = None
        while number is None:
            if ended.wait(POLL_SECONDS):
                return
            with suppress(Exception):  # a lost coordinator ends this process by itself
                number = processes.published_once("stop")
        with self._agreeing:
            last = last_step(self._places(ended), processes.count(), self._loops)
            if last is not None:
                self._agreed = (number, last)
        if ended.is_set():
            return
        if last is None:
            watched.interrupt(number)
        else:
            watched.pass_on(number)

    def _places(self, ended: threading.Event) -> list[tuple[int, int]]:
        """The loops and steps of all processes, as far as they say so."""
        found: dict[int, tuple[int, int]] = {}
        until = time.monotonic() + AGREE_SECONDS
        with suppress(Exception):
            processes.publish("at", (self._loops, self.steps))
            while len(found) < processes.count() and time.monotonic() < until and not ended.wait(POLL_SECONDS / 10):
                found = {process: tuple(at) for process, at in processes.published("at").items()}
        return list(found.values())

    @property
    def name(self) -> str:
        """The name of the signal that stopped the run."""
        assert self.signal is not None, "the run was stopped"
        return interrupts.name_of(self.signal)

    @property
    def exit(self) -> int:
        """The exit status of a run that was stopped."""
        assert self.signal is not None, "the run was stopped"
        return interrupts.exit_status(self.signal)


def last_step(places: Collection[tuple[int, int]], count: int, own: int) -> float | None:
    """After how many steps a process stops; inf: at the end of its loop; None: at once.

    places: of all `count` processes, twice the number of loops that have ended, and 1 more inside of one; and the
    number of steps. own: the first of the two of this process. A loop that some have not begun is left at once: none of
    its steps can end. Where some have ended it, the others do too, with its last save.
    """
    loops = {loop for loop, _ in places}
    if len(places) < count or own % 2 == 0:
        return None
    if len(loops) == 1:
        return max(steps for _, steps in places) + 1
    return math.inf if own < max(loops) else None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """A StopRequest for the signals of this run, in all its processes."""
    watched, request = interrupts.current(), StopRequest()
    if watched is None or processes.count() == 1:
        yield request
        return
    with request.shared(watched):
        yield request

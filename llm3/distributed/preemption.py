"""Ctrl-C and the SIGTERM of a scheduler while a stage trains: it saves at the next step boundary and ends."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import jax
from jax.experimental import multihost_utils

from llm3.distributed import interrupts


@dataclass
class StopRequest:
    """Set by the first Ctrl-C or SIGTERM in a training loop, which then saves at the next step boundary and ends.

    With several processes, the preemption service of jax forwards the signal of one process to all, and chooses a step
    that none of them has reached yet.
    """

    signal: int | None = None
    steps: int = 0  # how often `at_step` was called; equal on all processes
    done: int = 0  # steps of the stage that are done

    def at_step(self) -> bool:
        """Whether to stop after this step; call it once per step. All processes get the same answer."""
        self.steps, self.done = self.steps + 1, self.done + 1
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(self.steps):
            self.signal = signal.SIGTERM
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
        self.done = done
        watched.step, watched.stop = self._step, self._stop
        try:
            yield
        finally:
            watched.stop = None

    def _step(self) -> str:
        """The last step before a stop."""
        return f"step {self.done + 1}" if jax.process_count() == 1 else "the next step of all processes"

    def _stop(self, number: int) -> None:
        if jax.process_count() > 1:
            signal.raise_signal(signal.SIGTERM)  # jax handles SIGTERM
        else:
            self.signal = number

    @property
    def exit(self) -> int:
        """The exit status of a run that was stopped."""
        assert self.signal is not None, "the run was stopped"
        return interrupts.exit_status(self.signal)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """A StopRequest for the signals of this run. SIGTERM is handled like Ctrl-C while this context lasts."""
    watched = interrupts.current()
    if watched is None or jax.process_count() > 1:  # then jax handles SIGTERM
        yield StopRequest()
        return
    before = signal.signal(signal.SIGTERM, watched.handle)
    try:
        yield StopRequest()
    finally:
        signal.signal(signal.SIGTERM, before)

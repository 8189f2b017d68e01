"""Ctrl-C and the SIGTERM of a scheduler: a run saves at the next step boundary and ends."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import multihost_utils

from llm3.errors import Exit


@dataclass
class StopRequest:
    """Set by the first Ctrl-C or SIGTERM; the loop then saves at the next step boundary and ends.

    With several processes, the preemption service of jax forwards the signal of one process to all, and chooses a step
    that none of them has reached yet.
    """

    signal: int | None = None
    steps: int = 0  # how often `at_step` was called; equal on all processes

    def at_step(self) -> bool:
        """Whether to stop after this step; call it once per step. All processes get the same answer."""
        self.steps += 1
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(self.steps):
            self.signal = signal.SIGTERM
        return self.signal is not None

    @property
    def exit(self) -> int:
        """The exit status of a run that was stopped."""
        assert self.signal is not None, "the run was stopped"
        return Exit.PREEMPTED if self.signal == signal.SIGTERM else 128 + self.signal


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a StopRequest; a second signal ends the process at once."""
    request = StopRequest()
    asked: list[int] = []
    several = jax.process_count() > 1  # then jax handles SIGTERM

    def handle(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        if several:
            signal.raise_signal(signal.SIGTERM)
        else:
            request.signal = number

    handled = (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, handle) for number in handled}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""The for-loop: batch, step, log, save."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils

from llm3.data.mixture import prefetch
from llm3.distributed.watchdog import Watchdog
from llm3.errors import Diverged, Exit
from llm3.training.metrics import Meter
from llm3.training.step import TrainState

IN_FLIGHT = 2  # steps that the host is ahead of the devices


@dataclass
class StopRequest:
    """Set by the first Ctrl-C or SIGTERM; the loop saves at the next step boundary and ends.

    With several processes, jax's preemption service passes the signal of one of them on to all, and finds a step that
    none of them has made yet.
    """

    signal: int | None = None
    steps: int = 0  # how often `at_step` was called: the same on all processes

    def at_step(self) -> bool:
        """Whether to stop after this step, to be asked once at each; the same answer on all processes."""
        self.steps += 1
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(self.steps):
            self.signal = signal.SIGTERM
        return self.signal is not None

    @property
    def exit(self) -> int:
        """The exit status of a run that was stopped."""
        return Exit.PREEMPTED if self.signal == signal.SIGTERM else 128 + self.signal


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a StopRequest; a second one of them ends the process at once."""
    request, asked = StopRequest(), []
    several = jax.process_count() > 1  # then SIGTERM is jax's

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


class Hooks(NamedTuple):
    """What the loop calls besides the step.

    on_log(step, line) every `log_every` steps; on_save(step, state) every `save_every` steps, at the end and before a
    requested stop; both with steps counted from 1.
    """

    log_every: int
    save_every: int
    on_log: Callable[[int, dict], None]
    on_save: Callable[[int, TrainState], None]
    request: StopRequest
    watchdog: Watchdog


def train(
    train_step: Callable,
    state: TrainState,
    make_batch: Callable[[int], Any],
    meter: Meter,
    steps: tuple[int, int],
    hooks: Hooks,
    stop_after: int,
) -> tuple[TrainState, int]:
    """Steps (from, up to); the state and the step reached, which is less than asked for after a stop request.

    `make_batch(step)` gives the batch on the devices. Raises Diverged, before anything more is saved, where the guard
    has left out `stop_after` steps in a row.
    """
    (start, stop), watchdog = steps, hooks.watchdog
    batches = prefetch(make_batch, start, stop)
    meter.since = time.perf_counter()
    with closing(batches), watchdog.watching():
        for done in range(start + 1, stop + 1):
            watchdog.at(done, "reading data")
            before = time.perf_counter()
            batch = next(batches)
            meter.waited += time.perf_counter() - before
            watchdog.at(done, "computing")
            state, metrics = train_step(state, batch)
            meter.pending.append(metrics)
            if len(meter.pending) >= IN_FLIGHT:
                jax.block_until_ready(meter.pending[-IN_FLIGHT])
            ending = hooks.request.at_step() or done == stop
            saving = ending or done % hooks.save_every == 0
            if saving or done % hooks.log_every == 0:
                hooks.on_log(done, meter.log_line())
                check_guard(meter, done, stop_after)
            if saving:
                watchdog.at(done, "saving")
                hooks.on_save(done, state)
                meter.since = time.perf_counter()  # a save is not a part of the step time
            if ending:
                return state, done
    return state, start


def check_guard(meter: Meter, done: int, stop_after: int) -> None:
    """Raise Diverged where too many steps in a row were left out."""
    if meter.skipped_in_a_row >= stop_after:
        raise Diverged(
            f"step {done}: the last {meter.skipped_in_a_row} steps had no finite loss or gradient, or a spike of one, "
            f"and were left out (guard.stop_after={stop_after}). Nothing was saved since: lower the learning rate or "
            "look at the data, and start again from the last checkpoint"
        )

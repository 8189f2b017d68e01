"""The for-loop: batch, step, log, save."""

import time
from collections.abc import Callable
from contextlib import closing
from typing import Any, NamedTuple

import jax

from llm3.data.mixture import prefetch
from llm3.distributed.preemption import StopRequest
from llm3.distributed.watchdog import Watchdog
from llm3.errors import Diverged
from llm3.training.metrics import Meter
from llm3.training.step import TrainState

IN_FLIGHT = 2  # steps that the host is ahead of the devices


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

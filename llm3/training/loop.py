"""The training loop: batch, step, log, evaluate, save."""

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

IN_FLIGHT = 2  # number of steps that the host may run ahead of the devices


class Verdict(NamedTuple):
    """What an evaluation between steps decides: to save the step, or to end the stage with it."""

    save: bool = False
    stop: bool = False


class Hooks(NamedTuple):
    """What the loop calls besides the step.

    It calls on_eval(step, state) where `evaluates(step)`; on_sample(step, state) where `samples(step)`; on_log(step,
    line) every `log_every` steps and before each evaluation and save; and on_save(step, state) every `save_every`
    steps, at the end, before a requested stop, and where `saves(step)` or an evaluation asks for it. Steps are counted
    from 1.
    """

    log_every: int
    save_every: int
    evaluates: Callable[[int], bool]
    on_log: Callable[[int, dict], None]
    on_eval: Callable[[int, TrainState], Verdict]
    on_save: Callable[[int, TrainState], None]
    request: StopRequest
    watchdog: Watchdog
    samples: Callable[[int], bool] = lambda step: False
    on_sample: Callable[[int, TrainState], None] = lambda step, state: None
    saves: Callable[[int], bool] = lambda step: False


def train(
    train_step: Callable,
    state: TrainState,
    make_batch: Callable[[int], Any],
    meter: Meter,
    steps: tuple[int, int],
    hooks: Hooks,
    stop_after: int,
) -> tuple[TrainState, int]:
    """Train for `steps` = (start, stop); returns the state and the step reached.

    It ends before `stop` after a stop request, or where an evaluation ends the stage. `make_batch(step)` returns the
    batch on the devices. Raises Diverged, before the next save, once the guard has skipped `stop_after` non-finite
    steps since the last accepted step.
    """
    (start, stop), watchdog = steps, hooks.watchdog
    batches = prefetch(make_batch, start, stop)
    meter.since = time.perf_counter()
    with closing(batches), hooks.request.listening(start):
        for done in range(start + 1, stop + 1):
            watchdog.at(done, "reading data")
            before = time.perf_counter()
            batch = next(batches)
            meter.waited += time.perf_counter() - before
            watchdog.at(done, "computing")
            state, metrics = train_step(state, batch)
            meter.pending.append(metrics)
            if done == start + 1:
                jax.block_until_ready(metrics)
                meter.first_step()
            if len(meter.pending) >= IN_FLIGHT:
                jax.block_until_ready(meter.pending[-IN_FLIGHT])
            verdict = Verdict()
            if hooks.evaluates(done):
                log(done, meter, hooks, stop_after)
                watchdog.at(done, "evaluating")
                verdict = hooks.on_eval(done, state)
                meter.since = time.perf_counter()  # step times exclude evaluations
            if hooks.samples(done):
                sample(done, state, metrics, meter, hooks)
            # after the evaluation, during which a signal may have arrived
            ending = hooks.request.at_step() or done == stop or verdict.stop
            saving = ending or verdict.save or done % hooks.save_every == 0 or hooks.saves(done)
            if meter.pending and (saving or done % hooks.log_every == 0):
                log(done, meter, hooks, stop_after)
            if saving:
                watchdog.at(done, "saving")
                hooks.on_save(done, state)
                meter.since = time.perf_counter()  # step times exclude saves
            if ending:
                return state, done
    return state, start


def sample(done: int, state: TrainState, metrics: Any, meter: Meter, hooks: Hooks) -> None:
    """Sample once the step is computed, so that step times exclude samples. metrics: of the step."""
    hooks.watchdog.at(done, "sampling")
    jax.block_until_ready(metrics)
    before = time.perf_counter()
    hooks.on_sample(done, state)
    meter.since += time.perf_counter() - before


def log(done: int, meter: Meter, hooks: Hooks, stop_after: int) -> None:
    """Log the steps since the last log line. Raises Diverged as `train`."""
    hooks.on_log(done, meter.log_line())
    check_guard(meter, done, stop_after)


def check_guard(meter: Meter, done: int, stop_after: int) -> None:
    """Raise Diverged after too many non-finite steps without an accepted one between them."""
    if meter.non_finite_in_a_row >= stop_after:
        raise Diverged(
            f"step {done}: the loss or gradient of {meter.non_finite_in_a_row} steps in a row was not finite "
            f"(guard.stop_after={stop_after})",
            first=done - meter.non_finite_in_a_row + 1,
        )

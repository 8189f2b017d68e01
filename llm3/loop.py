"""The for-loop: batch, step, log, save."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from llm3.data.mixture import prefetch
from llm3.step import TrainState


@dataclass
class Cost:
    """What a stage has cost since its step 0; carried through its checkpoints."""

    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    skipped_steps: int = 0
    peak_bytes: int = 0


@dataclass
class StopRequest:
    """Set by the first Ctrl-C or SIGTERM; the loop saves at the next step boundary and ends."""

    signal: int | None = None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a StopRequest; a second one of them ends the process at once."""
    request = StopRequest()

    def handle(number: int, frame: Any) -> None:
        if request.signal is not None:
            raise KeyboardInterrupt
        request.signal = number

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class Meter:
    """Figures of the steps since the last log line."""

    cost: Cost
    flops_per_step: float
    peak_flops: float | None  # of all devices together
    pending: list[dict[str, jax.Array]] = field(default_factory=list)
    since: float = field(default_factory=time.perf_counter)
    waited: float = 0.0

    def log_line(self) -> dict[str, float | None]:
        """Wait for the pending steps; their means, rates and shares, and the cost so far brought up to date.

        loss and the objective's figures are weighted by the steps' weights, skipped steps left out; seconds are wall
        time.
        """
        steps_metrics = jax.device_get(self.pending)
        rows = {name: np.array([each[name] for each in steps_metrics], np.float64) for name in steps_metrics[0]}
        now = time.perf_counter()
        seconds, steps = now - self.since, len(self.pending)
        tokens = rows.pop("tokens").sum()
        self.cost.tokens += int(tokens)
        self.cost.seconds += seconds
        self.cost.flops += steps * self.flops_per_step
        kept = rows.pop("skipped") == 0
        self.cost.skipped_steps += int(np.sum(~kept))
        weight, norm = rows.pop("weight")[kept], rows.pop("grad_norm")[kept]
        rate = steps * self.flops_per_step / seconds
        mean = (lambda values: float(np.sum(values[kept] * weight) / weight.sum())) if any(kept) else lambda _: None
        line = {name: mean(values) for name, values in rows.items()} | {
            "gradient_norm": float(norm[-1]) if any(kept) else None,
            "skipped_steps": int(np.sum(~kept)),
            "tokens_per_second": float(tokens / seconds),
            "flops_per_second": rate,
            "mfu": rate / self.peak_flops if self.peak_flops else None,
            "data_wait": self.waited / seconds,
            "step_seconds": seconds / steps,
            "tokens": self.cost.tokens,
        }
        self.pending, self.since, self.waited = [], now, 0.0
        return line


def train(
    state: TrainState,
    train_step: Callable,
    make_batch: Callable[[int], Any],
    meter: Meter,
    *,
    start: int,
    stop: int,
    log_every: int,
    save_every: int,
    on_log: Callable[[int, dict], None],
    on_save: Callable[[int, TrainState], None],
    request: StopRequest,
) -> tuple[TrainState, int]:
    """Steps `start` to `stop`; the state and the step reached, which is less than `stop` after a stop request.

    `make_batch(step)` gives the batch on the devices. `on_save` is called every `save_every` steps, at the end and
    before a requested stop, with step counted from 1.
    """
    batches = prefetch(make_batch, start, stop)
    meter.since = time.perf_counter()
    for done in range(start + 1, stop + 1):
        before = time.perf_counter()
        batch = next(batches)
        meter.waited += time.perf_counter() - before
        state, metrics = train_step(state, batch)
        meter.pending.append(metrics)
        ending = done == stop or request.signal is not None
        saving = ending or done % save_every == 0
        if saving or done % log_every == 0:
            on_log(done, meter.log_line())
        if saving:
            on_save(done, state)
            meter.since = time.perf_counter()  # a save is not a part of the step time
        if ending:
            batches.close()
            return state, done
    return state, start

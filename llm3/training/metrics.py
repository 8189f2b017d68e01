"""The cost of a stage so far, and the metrics of its steps since the last log line."""

import time
from dataclasses import dataclass, field

import jax
import numpy as np


@dataclass
class Cost:
    """The cost of a stage since its step 0; saved in its checkpoints."""

    tokens: int = 0
    flops: float = 0.0  # model FLOPs
    seconds: float = 0.0
    skipped_steps: int = 0
    peak_bytes: int = 0


@dataclass
class Meter:
    """Metrics of the steps since the last log line."""

    cost: Cost
    flops_per_step: float  # model FLOPs
    hardware_flops_per_step: float  # with what is computed again
    peak_flops: float | None  # peak FLOP/s of all devices together; None: unknown
    pending: list[dict[str, jax.Array]] = field(default_factory=list)
    non_finite_in_a_row: int = 0  # non-finite steps since the last accepted one, as of the last log line
    since: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    began: float | None = None  # when the command, or the stage, began, until its first step is computed
    first_step_seconds: float | None = None  # from there to the end of its first step, until it is logged

    def first_step(self) -> None:
        """The first step since the start of the loop is computed."""
        if self.began is not None:
            self.first_step_seconds, self.began = time.perf_counter() - self.began, None

    def log_line(self) -> dict[str, float | None]:
        """Wait for the pending steps, add them to the cost, and return their means and rates.

        The loss and the objective's metrics are means over the accepted steps, weighted by the steps' weights. Seconds
        are wall time. mfu and hfu are the model and the hardware FLOP/s over the peak. The first line of a command has
        `first_step_seconds`: from its start to the end of its first step.
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
        self.non_finite_in_a_row = int(rows.pop("non_finite_in_a_row")[-1])
        new_levels = int(np.sum(rows.pop("new_level")))
        self.cost.skipped_steps += int(np.sum(~kept))
        weight, norm = rows.pop("weight")[kept], rows.pop("grad_norm")[kept]
        rate, hardware = (steps * each / seconds for each in (self.flops_per_step, self.hardware_flops_per_step))
        mean = (lambda values: float(np.sum(values[kept] * weight) / weight.sum())) if any(kept) else lambda _: None
        line = {name: mean(values) for name, values in rows.items()} | {
            "gradient_norm": float(norm[-1]) if any(kept) else None,
            "skipped_steps": int(np.sum(~kept)),
            "new_levels": new_levels,
            "tokens_per_second": float(tokens / seconds),
            "flops_per_second": rate,
            "hardware_flops_per_second": hardware,
            "mfu": rate / self.peak_flops if self.peak_flops else None,
            "hfu": hardware / self.peak_flops if self.peak_flops else None,
            "data_wait": self.waited / seconds,
            "step_seconds": seconds / steps,
            "tokens": self.cost.tokens,
        }
        if self.first_step_seconds is not None:
            line["first_step_seconds"], self.first_step_seconds = self.first_step_seconds, None
        self.pending, self.since, self.waited = [], now, 0.0
        return line

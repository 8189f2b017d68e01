"""The verb `bench`: one stage's real step on its real batches, timed; beside full training, where it trains a part."""

import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from llm3.config.schema import RunConfig
from llm3.distributed.sharding import place_batch
from llm3.errors import UserError, nearest
from llm3.models.transformer import init
from llm3.report.units import digits
from llm3.stages import rules
from llm3.stages.cost import byte_report
from llm3.stages.experiment import prepare
from llm3.stages.session import Session
from llm3.stages.stage import Stage
from llm3.training.phase import Phase
from llm3.tree import size

WARM_UP, TIMED = 2, 10
COMPARED = (
    "step_seconds",
    "flops_per_step",
    "compiler_flops",
    "temp_bytes",
    "opt_bytes",
    "gradient_bytes",
    "argument_bytes",
    "trainable_params",
)


def bench(config: RunConfig, workdir: Path, stage: str, as_json: bool = False, alone: bool = False) -> int:
    """Compile the step of a stage, warm it up, time 10 steps on its batches from the start, and print the figures.

    Where the stage begins with a part of the model frozen, or with adapters, the same stage with `train="all"` is
    timed as well: in the same process, a step of one after a step of the other. `alone` leaves that out.
    """
    order = rules.check(config)
    if stage not in order:
        raise UserError(f"--stage={stage}: no such stage; {nearest(stage, order)}")
    session = Session(prepare(config, workdir, [stage]), Console(stderr=True, highlight=False))
    with session.on_mesh():
        figures = measure(session, session.experiment.stages[stage], alone)
    print(json.dumps(figures) if as_json else table(figures))
    return 0


def measure(session: Session, stage: Stage, alone: bool = False) -> dict:
    """The figures of a stage's step: `step_seconds` is the median of wall times, bytes are those of one device.

    Where it is compared, `full` has the same figures of full training, and `ratios` those of `COMPARED` over them.
    """
    phases = [session.phases(stage)[0]]
    if not alone and _trains_a_part(phases[0]):
        phases.append(stage.full_training().phases(session.mesh)[0])
    steps = [_Step(session, stage, phase) for phase in phases]
    for i in range(WARM_UP + TIMED):
        batch = jax.block_until_ready(place_batch(session.mesh, stage.data.mixture.batch(i)))
        for step in steps:
            step.take(batch)
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    own, *full = (step.figures() for step in steps)
    result = {"stage": stage.name, "device": device, **own}
    return result | {"full": full[0], "ratios": _ratios(own, full[0])} if full else result


def _trains_a_part(phase: Phase) -> bool:
    return bool(jax.tree.leaves(phase.abstract_state.frozen)) or bool(phase.model.adapters)


def _ratios(own: dict, full: dict) -> dict[str, float | None]:
    return {key: own[key] / full[key] if own[key] is not None and full[key] else None for key in COMPARED}


class _Step:
    """A phase's compiled step, its state, and the wall time of each step that it took."""

    def __init__(self, session: Session, stage: Stage, phase: Phase):
        self._session, self._stage, self._trainer = session, stage, phase
        before = time.perf_counter()
        self._compiled = phase.train_step.lower(phase.abstract_state, stage.abstract_batch(session.mesh)).compile()
        self._compile_seconds, self._seconds = time.perf_counter() - before, []
        self._state = phase.state(init(phase.model, session.experiment.init_seed, session.mesh))

    def take(self, batch: Any) -> None:
        """One step, timed from its call until everything that it computes is there."""
        before = time.perf_counter()
        self._state, _ = jax.block_until_ready(self._compiled(self._state, batch))
        self._seconds.append(time.perf_counter() - before)

    def figures(self) -> dict[str, float | int | None]:
        phase, timed = self._trainer, self._seconds[WARM_UP:]
        median, memory, peak = statistics.median(timed), self._compiled.memory_analysis(), self._session.peak_flops
        stored = byte_report(phase.abstract_state)
        return {
            "step_seconds": median,
            "step_seconds_min": min(timed),
            "step_seconds_max": max(timed),
            "tokens_per_second": self._stage.step_tokens / median,
            "flops_per_step": phase.flops_per_step,
            "compiler_flops": self._compiler_flops(),
            "flops_per_second": phase.flops_per_step / median,
            "mfu": phase.flops_per_step / median / peak if peak else None,
            "compile_seconds": self._compile_seconds,
            "temp_bytes": memory.temp_size_in_bytes,
            "argument_bytes": memory.argument_size_in_bytes,
            "opt_bytes": stored["moment_bytes"],
            "gradient_bytes": stored["gradient_bytes"],
            "params": size(phase.abstract_params),
            "trainable_params": size(phase.abstract_state.trainable),
        }

    def _compiler_flops(self) -> float | None:
        """The compiler's count, with element-wise work; None where it counts one round of a loop, or one device."""
        model = self._trainer.model
        whole = model.scan_unroll >= model.layers and self._stage.config.micro_batches == 1 and jax.device_count() == 1
        return self._compiled.cost_analysis()["flops"] if whole else None


def table(figures: dict) -> str:
    """The figures for people: a line each, and beside them those of full training and the ratios."""
    own = {key: value for key, value in figures.items() if key not in ("full", "ratios")}
    if "full" not in figures:
        return "\n".join(f"{key:<20}{_text(value)}" for key, value in own.items())
    full, ratios = figures["full"], figures["ratios"]
    lines = [f"{'':<20}{figures['stage']:>20}{'trains all':>20}{'ratio':>10}"]
    for key, value in own.items():
        if key in full:
            ratio = ratios.get(key)
            share = "" if ratio is None else f"{ratio:.3f}"
            lines.append(f"{key:<20}{_text(value):>20}{_text(full[key]):>20}{share:>10}".rstrip())
        elif key != "stage":
            lines.insert(0, f"{key:<20}{value}")
    return "\n".join(lines)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1e4 else digits(value)
    return f"{value:,}" if isinstance(value, int) else "-" if value is None else str(value)

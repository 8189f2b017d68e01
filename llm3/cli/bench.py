"""The verb `bench`: time a stage's step on its real batches, compared with full training if parameters are frozen."""

import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax

from llm3.cli.bench_decoding import measure_decoding
from llm3.config.schema import RunConfig
from llm3.distributed import memory
from llm3.distributed.sharding import place_batch
from llm3.errors import UserError, nearest
from llm3.models.cross_entropy import blocks
from llm3.models.transformer import init
from llm3.report.console import new_console
from llm3.report.units import NOT_APPLICABLE, count, memory_text, percent, seconds
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
    "hardware_flops_per_step",
    "compiler_flops",
    "temp_bytes",
    "opt_bytes",
    "gradient_bytes",
    "argument_bytes",
    "trainable_params",
)

WORDS = {
    "temp_bytes": "temporary memory",
    "argument_bytes": "memory of arguments",
    "opt_bytes": "memory of moments",
    "gradient_bytes": "memory of gradients",
}


def bench(
    config: RunConfig, workdir: Path, stage: str, as_json: bool = False, alone: bool = False, decode: bool = False
) -> int:
    """Compile and warm up the step of a stage, time 10 steps on its first batches, and print the metrics.

    If the stage begins with frozen parameters or adapters, it also times full training of the plain model, in the same
    process and in alternating steps, unless `alone` is set. decode: time decoding instead.
    """
    order = rules.check(config)
    if stage not in order:
        raise UserError(f"--stage={stage}: no such stage; {nearest(stage, order)}")
    session = Session(prepare(config, workdir, [stage]), new_console(stderr=True))
    chosen = session.experiment.stages[stage]
    with session.on_mesh(), memory.explained(chosen.where, session.memory_fields(chosen)):
        metrics = measure_decoding(session, chosen) if decode else measure(session, chosen, alone)
    if session.unknown_peak:
        session.console.print(session.unknown_peak)
    print(json.dumps(metrics) if as_json else table(metrics))
    return 0


def measure(session: Session, stage: Stage, alone: bool = False) -> dict:
    """The metrics of a stage's step: `step_seconds` is the median wall time, bytes are per device.

    `flops_*` and `mfu` are about model FLOPs, `hardware_flops_*` and `hfu` about hardware FLOPs (see `models.flops`).
    In a comparison, `full` has the metrics of full training, and `ratios` has stage / full for the keys in `COMPARED`.
    """
    phases = [session.phases(stage)[0]]
    if not alone and _is_partial(phases[0]):
        phases.append(stage.full_training().phases(session.mesh)[0])
    steps = [_Step(session, stage, phase) for phase in phases]
    for i in range(WARM_UP + TIMED):
        batch = jax.block_until_ready(place_batch(session.mesh, stage.data.mixture.batch(i)))
        for step in steps:
            step.run(batch)
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    own, *full = (step.metrics() for step in steps)
    result = {"stage": stage.name, "device": device, **own}
    return result | {"full": full[0], "ratios": _ratios(own, full[0])} if full else result


def _is_partial(phase: Phase) -> bool:
    return bool(jax.tree.leaves(phase.abstract_state.frozen)) or bool(phase.model.adapters)


def _ratios(own: dict, full: dict) -> dict[str, float | None]:
    return {key: own[key] / full[key] if own[key] is not None and full[key] else None for key in COMPARED}


class _Step:
    """A phase's compiled step, its state, and the wall time of each step."""

    def __init__(self, session: Session, stage: Stage, phase: Phase):
        self._session, self._stage, self._phase = session, stage, phase
        before = time.perf_counter()
        self._compiled = phase.train_step.lower(phase.abstract_state, stage.abstract_batch(session.mesh)).compile()
        self._compile_seconds = time.perf_counter() - before
        self._seconds: list[float] = []
        self._state = phase.state(init(phase.model, session.experiment.init_seed, session.mesh))

    def run(self, batch: Any) -> None:
        """Run one step, and time it from the call until all results are ready."""
        before = time.perf_counter()
        self._state, _ = jax.block_until_ready(self._compiled(self._state, batch))
        self._seconds.append(time.perf_counter() - before)

    def metrics(self) -> dict[str, float | int | None]:
        phase, timed = self._phase, self._seconds[WARM_UP:]
        median, memory, peak = statistics.median(timed), self._compiled.memory_analysis(), self._session.peak_flops
        assert memory is not None  # XLA reports memory on all supported devices
        stored = byte_report(phase.abstract_state)
        return {
            "step_seconds": median,
            "step_seconds_min": min(timed),
            "step_seconds_max": max(timed),
            "tokens_per_second": self._stage.step_tokens / median,
            "flops_per_step": phase.flops_per_step,
            "hardware_flops_per_step": phase.hardware_flops_per_step,
            "compiler_flops": self._compiler_flops(),
            "flops_per_second": phase.flops_per_step / median,
            "mfu": phase.flops_per_step / median / peak if peak else None,
            "hfu": phase.hardware_flops_per_step / median / peak if peak else None,
            "compile_seconds": self._compile_seconds,
            "temp_bytes": memory.temp_size_in_bytes,
            "argument_bytes": memory.argument_size_in_bytes,
            "opt_bytes": stored["moment_bytes"],
            "gradient_bytes": stored["gradient_bytes"],
            "params": size(phase.abstract_params),
            "trainable_params": size(phase.abstract_state.trainable),
        }

    def _compiler_flops(self) -> float | None:
        """The compiler's count, with element-wise work; None if it counts one loop iteration or one device."""
        model = self._phase.model
        exact = model.scan_unroll >= model.layers and blocks(model.padded_vocab_size, model.vocab_block)[0] == 1
        exact = exact and self._stage.config.micro_batches == 1 and jax.device_count() == 1
        analysis = self._compiled.cost_analysis() if exact else None
        return None if analysis is None else analysis["flops"]


def table(metrics: dict) -> str:
    """A text table of the metrics with units, one per line, compared with full training if there is a comparison."""
    own = {key: value for key, value in metrics.items() if key not in ("full", "ratios")}
    if "full" not in metrics:
        return "\n".join(f"{words(key):<26}{_text(key, value)}" for key, value in own.items())
    full, ratios = metrics["full"], metrics["ratios"]
    lines = [f"{'':<26}{metrics['stage']:>18}{'trains all':>18}{'ratio':>8}"]
    for key, value in own.items():
        if key in full:
            ratio = ratios.get(key)
            share = "" if ratio is None else f"{ratio:.3f}"
            lines.append(f"{words(key):<26}{_text(key, value):>18}{_text(key, full[key]):>18}{share:>8}".rstrip())
        elif key != "stage":
            lines.insert(0, f"{words(key):<26}{value}")
    return "\n".join(lines)


def words(key: str) -> str:
    """What a metric is, without the unit that its value has: step_seconds_min is "step time min"."""
    return WORDS.get(key) or key.replace("_seconds", "_time").replace("_", " ")


def _text(key: str, value: Any) -> str:
    """The value of a metric with its unit, which the name of the metric tells."""
    if value is None or isinstance(value, str):
        return value or NOT_APPLICABLE
    if "_per_second" in key:
        return f"{count(value)}{'FLOP' if 'flops' in key else ' tokens'}/s"
    if "flops" in key:
        return f"{count(value)}FLOP"
    if "seconds" in key:
        return seconds(value)
    if key.endswith("bytes"):
        return memory_text(value)
    return percent(value) if key in ("mfu", "hfu") else count(value)

"""The verb `bench`: time a stage's step on its real batches, compared with full training or with another library."""

import json
import statistics
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import jax

from llm3.cli.bench.decoding import measure_decoding
from llm3.cli.bench.matmul import matmul_peak
from llm3.cli.bench.operations import profiled
from llm3.cli.bench.step import WARM_UP, BenchStep, Fed, fed
from llm3.cli.bench.sweep import best_of, swept
from llm3.cli.bench.text import sweep_table, table
from llm3.config.schema import RunConfig
from llm3.data.mixture import prefetch
from llm3.distributed import command_time, compiled, memory
from llm3.distributed.sharding import place_rows, rows_of_process
from llm3.errors import UserError, nearest
from llm3.models.attention.choice import platform
from llm3.report.console import new_console
from llm3.stages import rules
from llm3.stages.experiment import prepare
from llm3.stages.session import Session
from llm3.stages.stage import Stage
from llm3.training.phase import Phase

TIMED, LOOPED = 10, 5  # steps that are timed one by one, and those of a loop as in training
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


def bench(
    config: RunConfig,
    workdir: Path,
    stage: str,
    as_json: bool = False,
    alone: bool = False,
    profile: Path | None = None,
    sweep: bool = False,
    peer: list[str] | None = None,
    decode: bool = False,
) -> int:
    """Compile and warm up the step of a stage, time 10 steps on its first batches, and print the metrics.

    If the stage begins with frozen parameters or adapters, it also times full training of the plain model, in the same
    process and in alternating steps, unless `alone` is set, or a peer: the libraries to compare with. profile: where to
    write a trace. sweep: time combinations of settings instead; decode: decoding.
    """
    order = rules.check(config)
    if stage not in order:
        raise UserError(f"--stage={stage}: no such stage; {nearest(stage, order)}")
    session = Session(prepare(config, workdir, [stage]), new_console(stderr=True))
    chosen = session.experiment.stages[stage]
    with session.on_mesh():
        for note in chosen.attention_notes(session.mesh, platform()):
            session.console.print(note)
        if sweep:
            return _sweep(session, chosen, as_json)
        with memory.explained(chosen.where, session.memory_fields(chosen)):
            metrics = (
                measure_decoding(session, chosen, peer or [])
                if decode
                else measure(session, chosen, alone, profile, peer or [])
            )
    print(json.dumps(metrics) if as_json else table(metrics))
    return 0


def _sweep(session: Session, stage: Stage, as_json: bool) -> int:
    rows = swept(session, stage)
    best = best_of(rows, stage)
    print(json.dumps({"stage": stage.name, "rows": rows, "best": best}) if as_json else sweep_table(rows, best))
    return 0


def measure(
    session: Session, stage: Stage, alone: bool = False, profile: Path | None = None, peers: list[str] | None = None
) -> dict:
    """The metrics of a stage's step: `step_seconds` is the median wall time, bytes are per device.

    `flops_*` and `mfu` are about model FLOPs, `hardware_flops_*` and `hfu` about hardware FLOPs (see `models.flops`);
    mfu and hfu are shares of `matmul_peak`, which is stated or measured. `first_step_seconds`: from the start of the
    command to the end of the first step. `data_wait_share`: of the time of a loop as in training. In a comparison,
    `full` has the metrics of full training, and `ratios` has stage / full for the keys in `COMPARED`.
    """
    began, phase = command_time.take(), session.phases(stage)[0]
    own, batch = BenchStep(session, stage, phase), fed(session, stage, 0)
    own.run(batch)
    result: dict[str, Any] = {"first_step_seconds": time.perf_counter() - began}
    programs = compiled.programs()
    result |= {"compiled_programs": programs.compiled, "cached_programs": programs.cached}
    full = None
    if not (alone or peers) and _is_partial(phase):
        full = BenchStep(session, stage.full_training(), stage.full_training().phases(session.mesh)[0])
    others = _peer_steps(stage, phase, peers or [])
    steps = [own, *([full] if full else []), *others.values()]
    _in_turns(session, stage, batch, steps)
    peak = matmul_peak(session)
    result |= {"matmul_peak": peak.flops_per_second, "matmul_peak_source": peak.source}
    result["data_wait_share"] = data_wait_share(session, stage, own)
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    result = {"stage": stage.name, "device": device, **own.metrics(peak.flops_per_second), **result}
    if full:
        result["full"] = full.metrics(peak.flops_per_second)
        result["ratios"] = _ratios(result, result["full"])
    if others:
        result["peers"] = {name: compared(each, own.seconds) for name, each in others.items()}
    if profile is not None:
        result["profile"] = profiled(profile, own, batch)
    return result


def _in_turns(session: Session, stage: Stage, first: Fed, steps: list[Any]) -> None:
    """Warm up and time steps that take turns on the same batches; every other time in the opposite order.

    The first of them has run on the first batch.
    """
    for step in steps[1:]:
        step.run(first)
    for i in range(1, WARM_UP + TIMED):
        batch = fed(session, stage, i)
        for step in steps if i % 2 else reversed(steps):
            step.run(batch)


def _peer_steps(stage: Stage, phase: Phase, names: list[str]) -> dict[str, Any]:
    if not names:
        return {}
    from llm3.cli.bench.torch_peer import TorchStep  # needs torch

    return {name: TorchStep(stage, phase, compiles=name == "torch.compile") for name in names}


def compared(peer: Any, own: list[float]) -> dict[str, Any]:
    """The metrics of a peer; `ratio` is the median over the turns of its step time divided by that of the stage."""
    ratios = [theirs / ours for theirs, ours in zip(peer.seconds, own, strict=True)]
    return {
        "of": "a step",
        "step_seconds": statistics.median(peer.seconds),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "pairs": len(ratios),
        **peer.facts(),
    }


def data_wait_share(session: Session, stage: Stage, step: BenchStep) -> float:
    """The share of the time of a loop, in which a thread prepares batches as in training, that waits for them."""
    mesh, size = session.mesh, stage.config.batch_size
    rows = rows_of_process(mesh, size)

    def make(number: int) -> Any:
        return place_rows(mesh, size, stage.data.mixture.batch(number, rows))

    waited = 0.0
    with closing(prefetch(make, 0, LOOPED + 1)) as batches:
        batch = next(batches)
        started = time.perf_counter()
        for _ in range(LOOPED):
            step.follow(batch)
            before = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - before
    return waited / (time.perf_counter() - started)


def _is_partial(phase: Phase) -> bool:
    return bool(jax.tree.leaves(phase.abstract_state.frozen)) or bool(phase.model.adapters)


def _ratios(own: dict, full: dict) -> dict[str, float | None]:
    return {key: own[key] / full[key] if own[key] is not None and full[key] else None for key in COMPARED}

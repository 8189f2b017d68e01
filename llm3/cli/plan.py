"""The verb `plan`: what each stage trains and costs."""

from collections import Counter
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from llm3.cli.plan_checks import Refusals, check_handoffs, check_parents, refused
from llm3.cli.plan_totals import NOT_COUNTED, Total, plan_console, totals_table
from llm3.config.schema import RunConfig
from llm3.errors import UserError, counted
from llm3.files import ROW, read_json
from llm3.optim.optimizer import state_bytes
from llm3.report.units import count, memory_text, percent
from llm3.segments import canonical_path, in_stack, segment_path
from llm3.stages import rules
from llm3.stages.cost import step_cost
from llm3.stages.experiment import prepare
from llm3.stages.session import Session
from llm3.stages.stage import Stage
from llm3.training.phase import Phase
from llm3.tree import flatten, size


def plan(
    config: RunConfig,
    workdir: Path,
    stages: list[str] | None = None,
    topology: str | None = None,
    aot: bool = False,
    price: float | None = None,
) -> int:
    """Print each stage's leaves, the trainable ones, the cost of a step compared with full training, and the totals.

    Reads and caches the documents (for the vocabulary and the classes) without training. topology: plan for that
    machine instead. price: of a device-hour. Raises UserError, after it has printed, for what `run` would refuse.
    """
    if topology:
        from llm3.cli.plan_topology import plan_on  # which puts jax on the CPU

        return plan_on(config, workdir, stages, topology, aot, price)
    if aot:
        raise UserError("--aot: expected --topology=NAME as well, a TPU")
    console, order, found = plan_console(), rules.chosen(config, stages), Refusals()
    check_parents(config, workdir, order, found)
    try:
        session = Session(prepare(config, workdir, order), console)
    except UserError as error:
        _print_notes(found, console)
        raise refused([*found, error]) from None
    totals = []
    with session.on_mesh():
        for stage in session.experiment.stages.values():
            for phase in session.phases(stage):
                _show(stage, phase, session.mesh, console)
            totals.append(_total(session, stage))
        check_handoffs(session, order, found)
    console.print()
    console.print(totals_table(totals, jax.device_count(), price))
    measured = "steps as measured in this workdir where they were; else " * any(_measured(workdir, n) for n in order)
    console.print(f"  {measured}the rate that this machine is expected to reach; {NOT_COUNTED}")
    _print_notes(found, console)
    if found:
        raise refused(found)
    return 0


def _print_notes(found: Refusals, console: Console) -> None:
    for note in found.notes:
        console.print(f"  {note}")


def _measured(workdir: Path, name: str) -> float | None:
    """The median seconds of a step of a stage that was trained in this workdir."""
    return (read_json(workdir / name / ROW) or {}).get("step_seconds")


def _total(session: Session, stage: Stage) -> Total:
    """What the steps of a stage take on this machine."""
    phases, steps = session.phases(stage), stage.config.steps
    hardware = sum(phase.hardware_flops_per_step * (phase.stop - phase.first) for phase in phases)
    measured = _measured(session.workdir, stage.name)
    seconds = measured * steps if measured else hardware / session.flops_per_second()
    flops = sum(phase.flops_per_step * (phase.stop - phase.first) for phase in phases)
    return Total(stage.name, steps, stage.step_tokens * steps, flops, (seconds, seconds))


def _show(stage: Stage, phase: Phase, mesh: Mesh, console: Console) -> None:
    """The leaves and the cost of one phase of a stage."""
    added = [rule for step, rule in stage.config.unfreeze if step <= phase.first]
    later = f", and {added!r} from step {phase.first}" if added else ""
    console.print(f"\n{stage.name}: train={stage.config.train!r}{later}")
    console.print(leaf_table(phase))
    for line in [*summary(stage, phase, mesh), *(f"  {note}" for note in phase.notes)]:
        console.print(line)


def leaf_table(phase: Phase) -> Table:
    """One row per leaf of the canonical tree: its shape, parameters, bytes and trainable layers."""
    table = Table("leaf", "shape", "trains", box=None, header_style="bold")
    for column in ("parameters", "trainable", "memory"):
        table.add_column(column, justify="right")
    stored = leaf_bytes(phase)
    for path, leaf in flatten(phase.abstract_params).items():
        chosen = trainable_layers(phase, path)
        per_layer = int(np.prod(leaf.shape)) // phase.model.layers
        trainable = int(np.prod(leaf.shape)) if chosen is True else per_layer * len(chosen or ())
        trains = "yes" if chosen is True else "no" if not chosen else f"layers {', '.join(map(str, chosen))}"
        table.add_row(
            path, str(list(leaf.shape)), trains, count(np.prod(leaf.shape)), count(trainable), memory_text(stored[path])
        )
    return table


def leaf_bytes(phase: Phase) -> Counter[str]:
    """{canonical path: bytes} as stored by the step; frozen leaves may be quantized."""
    stored: Counter[str] = Counter()
    for part in (phase.abstract_state.trainable, phase.abstract_state.frozen):
        for path, leaf in flatten(part).items():
            stored[canonical_path(path)] += state_bytes(leaf)
    return stored


def trainable_layers(phase: Phase, path: str) -> bool | list[int]:
    """Whether a canonical leaf is trainable; for a leaf of which only some layers are, these layers."""
    partition = phase.partition
    if not in_stack(path):
        return path in partition.trainable
    layers = [
        layer
        for first, last in partition.segments
        for layer in range(first, last)
        if segment_path(path, first, last) in partition.trainable
    ]
    return len(layers) == phase.model.layers or layers


def summary(stage: Stage, phase: Phase, mesh: Mesh) -> list[str]:
    """Parameters, bytes and FLOPs per token of a phase, compared with full training."""
    cost = step_cost(stage, phase, mesh)
    trainable, total = cost["trainable_params"], size(phase.abstract_params)
    tokens, steps = stage.step_tokens, phase.stop - phase.first

    def stored(key: str) -> str:
        full = cost.get(f"full_{key}")
        share = f" ({percent(cost[key] / full)} of full training's)" if full and full != cost[key] else ""
        return memory_text(cost[key]) + share

    forward, backward = cost["forward_flops_per_token"], cost["backward_flops_per_token"]
    of_full = percent((forward + backward) / cost["full_flops_per_token"])
    more = phase.hardware_flops_per_step > phase.flops_per_step
    again = f"; {count(phase.hardware_flops_per_step / tokens)} with what is computed again" if more else ""
    return [
        f"  parameters {count(total)}, trainable {count(trainable)} ({percent(trainable / total)})",
        f"  memory: parameters {stored('param_bytes')}, gradients {stored('gradient_bytes')}, "
        f"moments {stored('moment_bytes')}",
        f"  FLOPs per token: forward {count(forward)}, backward {count(backward)}; {of_full} of full training's{again}",
        f"  {count(tokens)} tokens per step, {counted(steps, 'step')}, {count(phase.flops_per_step * steps)}FLOP",
    ]

"""The verb `plan`: what each stage trains and costs."""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from llm3.config.schema import MeshConfig, RunConfig
from llm3.distributed import machines
from llm3.distributed.machines import Topology
from llm3.distributed.mesh_axes import mesh_shape
from llm3.errors import UserError, counted
from llm3.optim.optimizer import state_bytes
from llm3.planning import aot as compiler
from llm3.planning.plan import PhasePlan, on_abstract_mesh, plan_phases, stage_on
from llm3.planning.roofline import EFFICIENCY, USABLE
from llm3.planning.trace import POLICIES
from llm3.report.console import new_console
from llm3.report.units import count, gibibytes, mebibytes, percent
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
) -> int:
    """Print each stage's leaves, the trainable ones, and the cost of a step compared with full training.

    Reads and caches the documents (for the vocabulary and the classes) without training or allocating arrays.
    topology: plan for that machine instead. aot: compare with the TPU compiler. Raises UserError.
    """
    if topology:
        return plan_on(config, workdir, stages, topology, aot)
    if aot:
        raise UserError("--aot: expected --topology=NAME as well, a TPU")
    console = _console()
    session = Session(prepare(config, workdir, rules.chosen(config, stages)), console)
    with session.on_mesh():
        for stage in session.experiment.stages.values():
            for phase in session.phases(stage):
                _show(stage, phase, session.mesh, console)
    return 0


def _show(stage: Stage, phase: Phase, mesh: Mesh, console: Console) -> None:
    """The leaves and the cost of one phase of a stage."""
    added = [rule for step, rule in stage.config.unfreeze if step <= phase.first]
    later = f", and {added!r} from step {phase.first}" if added else ""
    console.print(f"\n{stage.name}: train={stage.config.train!r}{later}")
    console.print(leaf_table(phase))
    for line in [*summary(stage, phase, mesh), *(f"  {note}" for note in phase.notes)]:
        console.print(line)


def _console() -> Console:
    return new_console(width=None if sys.stdout.isatty() else 120)


def plan_on(config: RunConfig, workdir: Path, stages: list[str] | None, topology: str, compiled: bool) -> int:
    """Print each stage's memory, FLOPs and step time on a machine that you need not have.

    Uses no device. compiled: compare with the TPU compiler. Raises UserError.
    """
    jax.config.update("jax_platforms", "cpu")
    order, console, machine = rules.chosen(config, stages), _console(), machines.parse(topology)
    if compiled:
        compiler.check(machine)
    for name in order:
        stage, notes = stage_on(config, name, workdir, machine)
        for index, each in enumerate(plan_phases(stage, config.mesh, machine)):
            for line in _heading(stage, config.mesh, each, machine):
                console.print(line)
            console.print(plan_table(stage, each, machine))
            for line in [*_remarks(each, machine), *notes]:
                console.print(f"  {line}")
            if compiled:
                with on_abstract_mesh(config.mesh, machine.devices):
                    found = compiler.compile_step(stage, config.mesh, machine, index)
                console.print(_comparison(each, found))
    for line in assumptions(config.mesh, machine):
        console.print(line)
    return 0


def _heading(stage: Stage, config: MeshConfig, each: PhasePlan, machine: Topology) -> list[str]:
    own, state = stage.config, each.phase.abstract_state
    mesh = ", ".join(f"{k} {v}" for k, v in mesh_shape(vars(config), machine.devices).items() if v > 1)
    split = f" in {own.micro_batches} micro-batches" if own.micro_batches > 1 else ""
    after = f" from step {each.phase.first}" if each.phase.first else ""
    return [
        f"\n{stage.name}{after} on {machine.name}, {mesh or 'one device'}: "
        f"{count(size(state.trainable))} of {count(size(each.phase.abstract_params))} parameters trainable, "
        f"{own.batch_size} x {own.sequence_length} tokens per step{split}"
    ]


def plan_table(stage: Stage, each: PhasePlan, machine: Topology) -> Table:
    """One row per metric, one column per remat policy; a star marks the config's policy."""
    tokens, peak, own = stage.step_tokens, machine.chip.peak * machine.devices, each.model.remat
    large = each.total(own) >= 2**30
    unit, amount = ("GiB", gibibytes) if large else ("MiB", mebibytes)
    grid = Table(f"{unit} per device", box=None, header_style="bold")
    for policy in POLICIES:
        grid.add_column(f"remat {policy}{'*' * (policy == own)}", justify="right")

    def row(label: str, cell: Callable[[str], str]) -> None:
        grid.add_row(label, *(cell(policy) for policy in POLICIES))

    def range_of(text: Callable[[float], str]) -> Callable[[str], str]:
        return lambda policy: f"{text(each.times[policy].sequential)} to {text(each.times[policy].overlapped)}"

    row("parameters", lambda policy: amount(each.stored.parameters))
    row("moments", lambda policy: amount(each.stored.moments))
    row("temporary, peak", lambda policy: amount(each.steps[policy].temporary))
    row("  gradients", lambda policy: amount(each.stored.gradients))
    row("  activations kept for the backward pass", lambda policy: amount(each.steps[policy].kept))
    row("total", lambda policy: amount(each.total(policy)))
    fits = f"fits into {USABLE:.0%} of {amount(machine.chip.memory)}"
    row(fits, lambda policy: "yes" if each.fits(policy, machine) else "no")
    row("hardware FLOPs per device", lambda policy: count(each.steps[policy].flops))
    row("model FLOPs per device", lambda policy: count(each.phase.flops_per_step / machine.devices))
    row("bytes of memory traffic", lambda policy: count(each.steps[policy].moved))
    row("seconds of matmuls", lambda policy: f"{each.times[policy].compute:.3g}")
    row("seconds of memory traffic", lambda policy: f"{each.times[policy].memory:.3g}")
    for axis in each.times[own].collectives:
        seconds = {policy: f"{each.times[policy].collectives[axis]:.3g}" for policy in POLICIES}
        row(f"seconds of collectives, {axis}", seconds.__getitem__)
    row("step seconds: sequential to overlapped", range_of(lambda seconds: f"{seconds:.3g}"))
    row("tokens per second", range_of(lambda seconds: count(tokens / seconds)))
    row("MFU", range_of(lambda seconds: percent(each.phase.flops_per_step / seconds / peak)))
    return grid


def _remarks(each: PhasePlan, machine: Topology) -> list[str]:
    """The fastest policy that fits, the largest arrays, and the notes of the phase."""
    best, own = each.best(machine), each.model.remat
    arrays = list(each.steps[own].largest.items())[:3]
    largest = ", ".join(f"{array} {mebibytes(size)} MiB" for array, size in arrays)
    fits = f"the fastest that fits: remat {best}" if best else "no remat policy fits"
    return [fits, f"largest: {largest}", *each.phase.notes]


def _comparison(each: PhasePlan, found: compiler.Compiled) -> Table | str:
    """The estimate compared with the compiler's account."""
    if found.rejection:
        return f"  the compiler rejects it: {found.rejection}"
    step = each.steps[each.model.remat]
    grid = Table(f"GiB, compiled in {found.seconds:.0f} s", box=None, header_style="bold")
    for column in ("estimate", "compiler", "estimate / compiler"):
        grid.add_column(column, justify="right")
    for label, estimate, reported in (
        ("arguments", each.stored.arguments, found.arguments),
        ("temporary, peak in use", step.temporary, found.beyond_arguments),
        ("temporary, by memory_analysis", step.temporary, found.temporary),
    ):
        grid.add_row(label, gibibytes(estimate), gibibytes(reported), f"{estimate / reported:.3f}" if reported else "-")
    return grid


def assumptions(config: MeshConfig, machine: Topology) -> list[str]:
    """The assumptions of a plan."""
    chip = machine.chip
    links = machines.links(machine, vars(config), config.across_hosts)
    return [
        f"\nAssumed: {chip.name}: {count(chip.peak)}FLOP/s peak, of which matmuls reach {EFFICIENCY:.0%}; "
        f"{count(chip.bandwidth)}B/s of memory bandwidth; each kernel reads and writes its arrays once",
        *(f"  {axis}: {link.words}" for axis, link in links.items() if link.size > 1),
        f"  memory: from a trace of the step, in program order; {1 - USABLE:.0%} is left to the runtime"
        + ("" if machine.is_tpu or chip.name == "cpu" else " (jax cost 75 % of a GPU: XLA_PYTHON_CLIENT_MEM_FRACTION)"),
        "  MFU: model FLOPs over the peak of all devices; hardware FLOPs also count what remat computes again",
    ]


def leaf_table(phase: Phase) -> Table:
    """One row per leaf of the canonical tree: its shape, parameters, bytes and trainable layers."""
    table = Table("leaf", "shape", "trains", box=None, header_style="bold")
    for column in ("parameters", "trainable", "MiB"):
        table.add_column(column, justify="right")
    stored = leaf_bytes(phase)
    for path, leaf in flatten(phase.abstract_params).items():
        chosen = trainable_layers(phase, path)
        per_layer = int(np.prod(leaf.shape)) // phase.model.layers
        trainable = int(np.prod(leaf.shape)) if chosen is True else per_layer * len(chosen or ())
        trains = "yes" if chosen is True else "no" if not chosen else f"layers {', '.join(map(str, chosen))}"
        mebibytes = f"{stored[path] / 2**20:.2f}"
        table.add_row(path, str(list(leaf.shape)), trains, count(np.prod(leaf.shape)), count(trainable), mebibytes)
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

    def mebibytes(key: str) -> str:
        full = cost.get(f"full_{key}")
        return f"{cost[key] / 2**20:.1f}" + (f" ({percent(cost[key] / full)} of full training's)" if full else "")

    forward, backward = cost["forward_flops_per_token"], cost["backward_flops_per_token"]
    of_full = percent((forward + backward) / cost["full_flops_per_token"])
    more = phase.hardware_flops_per_step > phase.flops_per_step
    again = f"; {count(phase.hardware_flops_per_step / tokens)} with what is computed again" if more else ""
    return [
        f"  parameters {count(total)}, trainable {count(trainable)} ({percent(trainable / total)})",
        f"  MiB: parameters {mebibytes('param_bytes')}, gradients {mebibytes('gradient_bytes')}, "
        f"moments {mebibytes('moment_bytes')}",
        f"  FLOPs per token: forward {count(forward)}, backward {count(backward)}; {of_full} of full training's{again}",
        f"  {count(tokens)} tokens per step, {counted(steps, 'step')}, {count(phase.flops_per_step * steps)}FLOP",
    ]

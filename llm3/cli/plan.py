"""The verbs that only read: `plan`, what each stage would train and cost, and `lineage`, where a run comes from."""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from llm3.checkpoints.load import trained_stages
from llm3.checkpoints.stage_checkpoints import Checkpoints
from llm3.config.schema import MeshConfig, RunConfig
from llm3.distributed import machines
from llm3.distributed.machines import Topology
from llm3.distributed.sharding import mesh_shape
from llm3.errors import UserError
from llm3.files import CHECKPOINTS
from llm3.handoff.account import changes
from llm3.optim.optimizer import state_bytes
from llm3.planning import aot as compiler
from llm3.planning.plan import PhasePlan, on_paper, plan_phases, stage_on
from llm3.planning.roofline import EFFICIENCY, USABLE
from llm3.planning.trace import POLICIES
from llm3.report.units import count, gibibytes, mebibytes, percent
from llm3.segments import canonical_path, in_stack, segment_path
from llm3.stages import rules
from llm3.stages.cost import savings
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
    """Print for each stage its leaves, which of them train, and what a step costs beside full training.

    The texts are read (for the vocabulary and the classes) and cached; nothing is trained or allocated. topology: on
    that machine instead. aot: with what the TPU's compiler says beside it. Raises UserError.
    """
    if topology:
        return plan_on(config, workdir, stages, topology, aot)
    if aot:
        raise UserError("--aot: expected --topology=NAME beside it, a TPU")
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
    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def plan_on(config: RunConfig, workdir: Path, stages: list[str] | None, topology: str, compiled: bool) -> int:
    """Print for each stage what a step takes of a device of a machine that need not be there, and how long.

    No device is used. compiled: with what the TPU's compiler says beside it. Raises UserError.
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
                with on_paper(config.mesh, machine):
                    found = compiler.compile_step(stage, config.mesh, machine, index)
                console.print(_beside(each, found))
    for line in assumptions(config.mesh, machine):
        console.print(line)
    return 0


def _heading(stage: Stage, config: MeshConfig, each: PhasePlan, machine: Topology) -> list[str]:
    own, state = stage.config, each.phase.abstract_state
    mesh = ", ".join(f"{k} {v}" for k, v in mesh_shape(vars(config), machine.devices).items() if v > 1)
    cut = f" in {own.micro_batches} micro-batches" if own.micro_batches > 1 else ""
    after = f" from step {each.phase.first}" if each.phase.first else ""
    return [
        f"\n[bold]{stage.name}[/bold]{after} on {machine.name}, {mesh or 'one device'}: "
        f"{count(size(state.trainable))} of {count(size(each.phase.abstract_params))} parameters train, "
        f"{own.batch_size} x {own.sequence_length} tokens a step{cut}"
    ]


def plan_table(stage: Stage, each: PhasePlan, machine: Topology) -> Table:
    """A row a figure, a column a remat policy; that of the config has a star."""
    tokens, peak, own = stage.step_tokens, machine.chip.peak * machine.devices, each.model.remat
    large = each.total(own) >= 2**30
    unit, amount = ("GiB", gibibytes) if large else ("MiB", mebibytes)
    grid = Table(f"{unit} of a device", box=None, header_style="bold")
    for policy in POLICIES:
        grid.add_column(f"remat {policy}{'*' * (policy == own)}", justify="right")

    def row(label: str, figure: Callable[[str], str]) -> None:
        grid.add_row(label, *(figure(policy) for policy in POLICIES))

    def range_of(figure: Callable[[float], str]) -> Callable[[str], str]:
        return lambda policy: " to ".join(
            figure(s) for s in (each.times[policy].in_turn, each.times[policy].overlapped)
        )

    row("parameters", lambda policy: amount(each.stored.parameters))
    row("moments", lambda policy: amount(each.stored.moments))
    row("temporary, at most", lambda policy: amount(each.steps[policy].temporary))
    row("  gradients", lambda policy: amount(each.stored.gradients))
    row("  activations kept for the backward pass", lambda policy: amount(each.steps[policy].kept))
    row("together", lambda policy: amount(each.total(policy)))
    fits = f"fits into {USABLE:.0%} of {amount(machine.chip.memory)}"
    row(fits, lambda policy: "yes" if each.fits(policy, machine) else "[red]no[/red]")
    row("FLOPs of a device", lambda policy: count(each.steps[policy].flops))
    row("bytes moved in its memory", lambda policy: count(each.steps[policy].moved))
    row("seconds of products", lambda policy: f"{each.times[policy].compute:.3g}")
    row("seconds of memory", lambda policy: f"{each.times[policy].memory:.3g}")
    for axis in each.times[own].collectives:
        row(f"seconds of collectives, {axis}", lambda policy, axis=axis: f"{each.times[policy].collectives[axis]:.3g}")
    row("step, seconds: one by one to all at once", range_of(lambda seconds: f"{seconds:.3g}"))
    row("tokens a second", range_of(lambda seconds: count(tokens / seconds)))
    row("MFU", range_of(lambda seconds: percent(each.model_flops / seconds / peak)))
    return grid


def _remarks(each: PhasePlan, machine: Topology) -> list[str]:
    """What fits best, and what is largest."""
    best, own = each.best(machine), each.model.remat
    arrays = list(each.steps[own].largest.items())[:3]
    largest = ", ".join(f"{array} {mebibytes(size)} MiB" for array, size in arrays)
    fits = f"the fastest that fits: remat {best}" if best else "no remat policy fits"
    return [fits, f"largest: {largest}", *each.phase.notes]


def _beside(each: PhasePlan, found: compiler.Compiled) -> Table | str:
    """The estimate and the compiler's figures."""
    if found.refused:
        return f"  the compiler refuses it: {found.refused}"
    step = each.steps[each.model.remat]
    grid = Table(f"GiB, compiled in {found.seconds:.0f} s", box=None, header_style="bold")
    for column in ("estimate", "compiler", "estimate / compiler"):
        grid.add_column(column, justify="right")
    for label, own, its in (
        ("arguments", each.stored.arguments, found.arguments),
        ("temporary, in use at once", step.temporary, found.beside_arguments),
        ("temporary, as memory_analysis has it", step.temporary, found.temporary),
    ):
        grid.add_row(label, gibibytes(own), gibibytes(its), f"{own / its:.3f}" if its else "-")
    return grid


def assumptions(config: MeshConfig, machine: Topology) -> list[str]:
    """What a forecast rests on."""
    chip = machine.chip
    links = machines.links(machine, vars(config), config.across_hosts)
    return [
        f"\nAssumed: {chip.name}: {count(chip.peak)}FLOP/s at most, of which products reach {EFFICIENCY:.0%}; "
        f"{count(chip.bandwidth)}B/s of memory; each kernel reads and writes its arrays once",
        *(f"  {axis}: {link.words}" for axis, link in links.items() if link.size > 1),
        f"  memory: by a trace of the step, in the order of the program; {1 - USABLE:.0%} is left to the runtime"
        + (
            "" if machine.is_tpu or chip.name == "cpu" else " (jax takes 75 % of a GPU: XLA_PYTHON_CLIENT_MEM_FRACTION)"
        ),
        "  MFU: FLOPs without what remat computes again, over the peak of all devices",
    ]


def leaf_table(phase: Phase) -> Table:
    """One row a leaf of the canonical tree: its shape, parameters, bytes, and which of it trains."""
    table = Table("leaf", "shape", "trains", box=None, header_style="bold")
    for column in ("parameters", "trainable", "MiB"):
        table.add_column(column, justify="right")
    stored = leaf_bytes(phase)
    for path, leaf in flatten(phase.abstract_params).items():
        chosen = training_layers(phase, path)
        per_layer = int(np.prod(leaf.shape)) // phase.model.layers
        trainable = int(np.prod(leaf.shape)) if chosen is True else per_layer * len(chosen or ())
        trains = "yes" if chosen is True else "no" if not chosen else f"layers {', '.join(map(str, chosen))}"
        mebibytes = f"{stored[path] / 2**20:.2f}"
        table.add_row(path, str(list(leaf.shape)), trains, count(np.prod(leaf.shape)), count(trainable), mebibytes)
    return table


def leaf_bytes(phase: Phase) -> Counter[str]:
    """{canonical path: bytes}, as the step holds the leaf: what is frozen may be stored in fewer."""
    stored: Counter[str] = Counter()
    for part in (phase.abstract_state.trainable, phase.abstract_state.frozen):
        for path, leaf in flatten(part).items():
            stored[canonical_path(path)] += state_bytes(leaf)
    return stored


def training_layers(phase: Phase, path: str) -> bool | list[int]:
    """Whether a canonical leaf trains: True or False, or the layers of it that do where only some of them do."""
    partition = phase.partition
    if not in_stack(path):
        return path in partition.trainable
    chosen = [
        layer
        for first, last in partition.segments
        for layer in range(first, last)
        if segment_path(path, first, last) in partition.trainable
    ]
    return len(chosen) == phase.model.layers or chosen


def summary(stage: Stage, phase: Phase, mesh: Mesh) -> list[str]:
    """Parameters, bytes for one device's worth of the whole state, and FLOPs a token, beside full training."""
    takes = savings(stage, phase, mesh)
    trainable, every = takes["trainable_params"], size(phase.abstract_params)
    tokens, steps = stage.step_tokens, phase.stop - phase.first

    def mebibytes(key: str) -> str:
        full = takes.get(f"full_{key}")
        return f"{takes[key] / 2**20:.1f}" + (f" ({percent(takes[key] / full)} of full training's)" if full else "")

    forward, backward = takes["forward_flops_per_token"], takes["backward_flops_per_token"]
    of_full = percent((forward + backward) / takes["full_flops_per_token"])
    return [
        f"  parameters {count(every)}, trainable {count(trainable)} ({percent(trainable / every)})",
        f"  MiB: parameters {mebibytes('param_bytes')}, gradients {mebibytes('gradient_bytes')}, "
        f"moments {mebibytes('moment_bytes')}",
        f"  FLOPs a token: forward {count(forward)}, backward {count(backward)}; {of_full} of full training's",
        f"  {count(tokens)} tokens a step, {steps} steps, {count(phase.flops_per_step * steps)}FLOP",
    ]


def lineage(workdir: Path) -> int:
    """Print where each stage of a run comes from, from the metadata of its newest checkpoint alone."""
    console = Console(highlight=False, soft_wrap=True)
    for name in trained_stages(workdir):
        checkpoints = Checkpoints(workdir / name / CHECKPOINTS, read_only=True)
        step = checkpoints.latest()
        meta = checkpoints.meta(step)
        own = {"run": str(workdir.resolve()), "stage": name, **meta}
        console.print(f"\n{name}")
        for depth, link in enumerate([*meta["lineage"], own]):
            cost = link["cost"]
            differs = "".join(f", {line}" for line in changes(link)) if depth else ""
            console.print(
                f"  {'  ' * depth}{link['run']}/{link['stage']} step {link['step']} ({link['kind']}, "
                f"{count(cost['tokens'])} tokens, parameters {link['params_digest'][:12]}{differs})"
            )
    return 0

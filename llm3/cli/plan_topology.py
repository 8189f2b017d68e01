"""The verb `plan` for a machine that you need not have."""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from rich.table import Table

from llm3.cli.plan_checks import Refusals, check_leaves, refused
from llm3.cli.plan_totals import NOT_COUNTED, Total, plan_console, totals_table
from llm3.config.schema import MeshConfig, RunConfig
from llm3.distributed import machines
from llm3.distributed.machines import Topology
from llm3.distributed.mesh_axes import mesh_shape
from llm3.planning import aot as compiler
from llm3.planning.hlo import Found
from llm3.planning.plan import PhasePlan, on_abstract_mesh, plan_phases, stage_on
from llm3.planning.roofline import EFFICIENCY, USABLE, Collective
from llm3.report.units import count, gibibytes, mebibytes, percent, seconds
from llm3.stages import rules
from llm3.stages.stage import Stage
from llm3.tree import size


def plan_on(
    config: RunConfig, workdir: Path, stages: list[str] | None, topology: str, compiled: bool, price: float | None
) -> int:
    """Print each stage's memory, FLOPs and step time on a machine that you need not have, and the totals.

    Uses no device. compiled: compare with the TPU compiler. Raises UserError, also for leaves that do not follow from
    those of a parent in the same run.
    """
    jax.config.update("jax_platforms", "cpu")
    order, console, machine = rules.chosen(config, stages), plan_console(), machines.parse(topology)
    if compiled:
        compiler.check(machine)
    planned, totals, found = {}, [], Refusals()
    for name in order:
        stage, notes = stage_on(config, name, workdir, machine)
        planned[name] = stage
        phases = plan_phases(stage, config.mesh, machine)
        with on_abstract_mesh(config.mesh, machine.devices) as mesh:
            notes = [*stage.attention_notes(mesh, machine.platform), *notes]
        totals.append(_total_on(stage, phases))
        for index, each in enumerate(phases):
            for line in _heading(stage, config.mesh, each, machine):
                console.print(line)
            console.print(plan_table(stage, each, machine))
            for line in [*_remarks(each, machine), *notes]:
                console.print(f"  {line}")
            if compiled:
                with on_abstract_mesh(config.mesh, machine.devices):
                    compiled_step = compiler.compile_step(stage, config.mesh, machine, index)
                console.print(_comparison(each, compiled_step))
                if compiled_step.collectives:
                    console.print(collectives_table(each.sent, compiled_step.collectives))
    console.print()
    console.print(totals_table(totals, machine.devices, price))
    console.print(f"  from overlapped to sequential steps; {NOT_COUNTED}")
    for line in assumptions(config.mesh, machine):
        console.print(line)
    check_leaves(planned, found)
    if found:
        raise refused(found)
    return 0


def _total_on(stage: Stage, phases: list[PhasePlan]) -> Total:
    """What the steps of a stage take on a machine."""
    own, each = stage.config, [(plan, plan.phase.stop - plan.phase.first) for plan in phases]
    times = [(plan.times[plan.model.remat], steps) for plan, steps in each]
    shortest = sum(time.overlapped * steps for time, steps in times)
    longest = sum(time.sequential * steps for time, steps in times)
    flops = sum(plan.phase.flops_per_step * steps for plan, steps in each)
    return Total(stage.name, own.steps, stage.step_tokens * own.steps, flops, (shortest, longest))


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
    for policy in each.steps:
        grid.add_column(f"remat {policy}{'*' * (policy == own)}", justify="right")

    def row(label: str, cell: Callable[[str], str]) -> None:
        grid.add_row(label, *(cell(policy) for policy in each.steps))

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
    row("time of matmuls", lambda policy: seconds(each.times[policy].compute))
    row("time of memory traffic", lambda policy: seconds(each.times[policy].memory))
    for axis in each.times[own].collectives:
        times = {policy: seconds(each.times[policy].collectives[axis]) for policy in each.steps}
        row(f"time of collectives, {axis}", times.__getitem__)
    row("step time: sequential to overlapped", range_of(seconds))
    row("tokens per second", range_of(lambda step: count(tokens / step)))
    row("MFU", range_of(lambda step: percent(each.phase.flops_per_step / step / peak)))
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


def collectives_table(planned: list[Collective], found: Sequence[Found]) -> Table:
    """The bytes of each kind of collective compared with the plan, and the shares that the compiled step overlaps."""
    grid = Table("GiB per step", box=None, header_style="bold")
    for column in ("plan", "compiler", "plan / compiler", "collectives", "asynchronous", "of bytes, during matmuls"):
        grid.add_column(column, justify="right")
    kinds = {kind: (kind,) for kind in ("all-gather", "reduce-scatter", "all-reduce")}
    for label, own in (kinds | {"in all, an all-reduce as two": tuple(kinds)}).items():
        wire = {kind: 2 if len(own) > 1 and kind == "all-reduce" else 1 for kind in own}
        plan = sum(each.bytes * wire.get(each.kind, 0) for each in planned)
        ours = [each for each in found if each.kind in own]
        sent = sum(each.bytes * wire[each.kind] for each in ours)
        hidden = sum(each.bytes * wire[each.kind] for each in ours if each.overlaps)
        runs = sum(each.times for each in ours)
        early = sum(each.times for each in ours if each.starts_early)
        ratio, *shares = (f"{plan / sent:.3f}", percent(early / runs), percent(hidden / sent)) if sent else ("-",) * 3
        grid.add_row(label, gibibytes(plan), gibibytes(sent), ratio, str(runs), *shares)
    return grid


def assumptions(config: MeshConfig, machine: Topology) -> list[str]:
    """The assumptions of a plan."""
    chip = machine.chip
    links = machines.links(machine, vars(config), config.across_hosts)
    return [
        f"\nAssumed: {chip.name}: {count(chip.peak)}FLOP/s peak, of which matmuls reach {EFFICIENCY:.0%}; "
        f"{count(chip.bandwidth)}B/s of memory bandwidth",
        "  kernels: each reads and writes its arrays once",
        *(f"  {axis}: {link.words}" for axis, link in links.items() if link.size > 1),
        f"  memory: from a trace of the step, in program order; {1 - USABLE:.0%} is left to the runtime",
        *[
            "  jax uses 75 % of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise",
        ]
        * (not machine.is_tpu and chip.name != "cpu"),
        "  MFU: model FLOPs over the peak of all devices; hardware FLOPs also count what remat computes again",
    ]

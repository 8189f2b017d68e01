"""Plans the stages of a config on hardware you do not have: memory, FLOPs and step time for each remat policy."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, cast

from jax.sharding import AbstractMesh, AxisType, Mesh

from llm3.config.schema import MeshConfig, ModelConfig, RunConfig
from llm3.distributed import machines
from llm3.distributed.machines import Link, Topology
from llm3.distributed.mesh_axes import mesh_shape, table
from llm3.distributed.sharding import rules_in_force
from llm3.errors import UserError
from llm3.planning import trace
from llm3.planning.roofline import USABLE, Collective, Times, collectives, times
from llm3.planning.trace import POLICIES, Step, Stored
from llm3.stages.experiment import read_library
from llm3.stages.stage import Stage, plan_stage, read_stage
from llm3.training.phase import Phase


class PhasePlan(NamedTuple):
    """The plan of a phase on a machine. steps, times: by remat policy. sent: collectives under the config's policy."""

    model: ModelConfig
    phase: Phase
    stored: Stored
    steps: dict[str, Step]
    times: dict[str, Times]
    sent: list[Collective]

    def total(self, policy: str) -> float:
        """Peak bytes on one device."""
        return self.stored.arguments + self.steps[policy].temporary

    def fits(self, policy: str, machine: Topology) -> bool:
        """Whether the peak fits into the memory of a device."""
        return self.total(policy) <= USABLE * machine.chip.memory

    def best(self, machine: Topology) -> str | None:
        """The fastest remat policy that fits, None if none does."""
        fitting = [policy for policy in self.steps if self.fits(policy, machine)]
        return min(fitting, key=lambda policy: self.times[policy].sequential, default=None)


@contextmanager
def on_abstract_mesh(config: MeshConfig, devices: int) -> Iterator[Mesh]:
    """The mesh of a config over so many devices, which need not exist, with its rules active. Raises UserError."""
    shape = mesh_shape(vars(config), devices)
    with rules_in_force(table(config.rules)):
        yield cast(Mesh, AbstractMesh(tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * len(shape)))


def stage_on(config: RunConfig, name: str, workdir: Path, machine: Topology) -> tuple[Stage, list[str]]:
    """The stage with the compute dtype of a machine, and notes on assumptions. Raises UserError.

    Reads documents only if the size of a step depends on them, through the number of classes and the documents per
    window. If they cannot be read, it uses the config alone.
    """
    dtype = "float32" if machine.name == "cpu" else "bfloat16"
    dtype = dtype if config.model.compute_dtype == "auto" else config.model.compute_dtype
    stage, notes = plan_stage(config, name), []
    if stage.objective.HEAD == "labels":
        try:
            stage = read_stage(config, name, workdir, read_library(config, workdir))
        except UserError as error:
            reason = str(error).splitlines()[0]
            notes = [f"assumed 1 class and a loss at every position: cannot read the documents ({reason})"]
    return stage.computed_in(dtype), notes


def plan_phases(
    stage: Stage, config: MeshConfig, machine: Topology, policies: tuple[str, ...] = POLICIES
) -> list[PhasePlan]:
    """The plans of a stage's phases under remat policies and the config's policy.

    Raises UserError if the mesh does not fit the machine's number of devices.
    """
    links = machines.links(machine, vars(config), config.across_hosts)
    with on_abstract_mesh(config, machine.devices) as mesh:
        phases = range(len(stage.phases(mesh)))
        return [_plan_phase(stage, mesh, machine, links, index, policies) for index in phases]


def _plan_phase(
    stage: Stage,
    mesh: Mesh,
    machine: Topology,
    links: dict[str, Link],
    index: int,
    policies: tuple[str, ...],
) -> PhasePlan:
    model, steps, seconds = stage.model, {}, {}
    for policy in dict.fromkeys((*policies, model.remat)):
        of_policy = replace(stage, model=replace(model, remat=policy))
        each = of_policy.phases(mesh)[index]
        sent = collectives(of_policy, each, mesh)
        steps[policy] = trace.step(of_policy, mesh, index, machine.platform)
        seconds[policy] = times(steps[policy].flops, steps[policy].moved, sent, machine, links)
        if policy == model.remat:
            phase, own_sent = each, sent
    stored = trace.stored(phase, stage, mesh)
    return PhasePlan(model, phase, stored, steps, seconds, own_sent)

"""What the stages of a config would take of a machine that need not be there, under each remat policy."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

from jax.sharding import AbstractMesh, AxisType

from llm3 import objectives
from llm3.config.schema import ModelConfig, RunConfig
from llm3.distributed import machines as topology
from llm3.distributed.machines import Link, Topology
from llm3.distributed.sharding import mesh_shape, rules_in_force, table
from llm3.models.flops import step_flops
from llm3.planning import trace as estimate
from llm3.planning.roofline import USABLE, Collective, Times, collectives, times
from llm3.planning.trace import POLICIES, Step, Stored
from llm3.stages.planned import stage_model, stage_trainers
from llm3.training.phase import Trainer


class Forecast(NamedTuple):
    """A phase of a stage on a machine. steps, times: by remat policy. sent: under the config's own policy. model_flops:
    of a step, without what is computed again.
    """

    model: ModelConfig
    trainer: Trainer
    stored: Stored
    steps: dict[str, Step]
    times: dict[str, Times]
    sent: list[Collective]
    model_flops: float

    def total(self, policy: str) -> float:
        """The bytes of a device at the most."""
        return self.stored.arguments + self.steps[policy].temporary

    def fits(self, policy: str, machine: Topology) -> bool:
        """Whether they are there."""
        return self.total(policy) <= USABLE * machine.chip.memory

    def best(self, machine: Topology) -> str | None:
        """The fastest policy that fits."""
        fitting = [policy for policy in self.steps if self.fits(policy, machine)]
        return min(fitting, key=lambda policy: self.times[policy].in_turn, default=None)


@contextmanager
def on_paper(config: RunConfig, machine: Topology) -> Iterator[AbstractMesh]:
    """The mesh of a config on a machine, without devices, its table of axes in force. Raises UserError."""
    shape = mesh_shape(vars(config.mesh), machine.devices)
    with rules_in_force(table(config.mesh.rules)):
        yield AbstractMesh(tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def dtype_on(machine: Topology) -> str:
    """What is computed in where the config says "auto"."""
    return "float32" if machine.name == "cpu" else "bfloat16"


def forecasts(config: RunConfig, name: str, machine: Topology, policies: tuple[str, ...] = POLICIES) -> list[Forecast]:
    """The phases of a stage, under remat policies among which is the config's own.

    Raises UserError for a config that does not fit the machine's number of devices.
    """
    links = topology.links(machine, vars(config.mesh), config.mesh.across)
    with on_paper(config, machine) as mesh:
        model = stage_model(config, name, dtype_on(machine))
        phases = stage_trainers(config, name, config.stages[name], model, mesh)
        return [_forecast(config, name, model, mesh, machine, links, phase, policies) for phase in range(len(phases))]


def _forecast(
    config: RunConfig,
    name: str,
    model: ModelConfig,
    mesh: AbstractMesh,
    machine: Topology,
    links: dict[str, Link],
    phase: int,
    policies: tuple[str, ...],
) -> Forecast:
    stage, steps, taken = config.stages[name], {}, {}
    for policy in policies:
        of_policy = replace(model, remat=policy)
        each = stage_trainers(config, name, stage, of_policy, mesh)[phase]
        sent = collectives(stage, of_policy, each, mesh)
        steps[policy] = estimate.step(config, name, of_policy, mesh, phase)
        taken[policy] = times(steps[policy].flops, steps[policy].moved, sent, machine, links)
        if policy == model.remat:
            trainer, own_sent = each, sent
    plain, head = replace(model, remat="none", logit_chunk=0), objectives.load(stage.objective_name).HEAD
    shape = (stage.batch_size, stage.sequence_length, "task" if head else "lm")
    wanted = sum(step_flops(plain, *shape, trainer.partition.segments, trainer.partition.trainable))
    stored = estimate.stored(trainer, stage, mesh)
    return Forecast(model, trainer, stored, steps, taken, own_sent, wanted)

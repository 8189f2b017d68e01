"""The real compiler for TPUs, without a TPU: what a step takes by its own account."""

import importlib.util
import os
import time
from typing import NamedTuple

import jax
from jax.experimental import topologies

from llm3.config.schema import MeshConfig
from llm3.distributed.machines import Topology
from llm3.distributed.sharding import make_mesh
from llm3.errors import UserError
from llm3.stages.stage import Stage

# libtpu looks for the TPU of this machine, and for its own file lock, unless it is told that there is none
ALONE = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


class Compiled(NamedTuple):
    """Bytes of one device, by `memory_analysis`; seconds: of compiling.

    beside_arguments: the most that is in use at once besides the arguments (which a step's results take the place of).
    It is what the compiler holds against the chip's memory. temporary: what `memory_analysis` calls temporary, which
    may be more than the chip has without being refused. refused: what the compiler said where it did not fit.
    """

    arguments: int = 0
    temporary: int = 0
    beside_arguments: int = 0
    seconds: float = 0.0
    refused: str = ""


def check(topology: Topology) -> None:
    """Raise UserError where this topology cannot be compiled for here."""
    if not topology.is_tpu:
        raise UserError(f"--aot: only TPUs can be compiled for without having them, not {topology.name}")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("--aot: needs the TPU's compiler: pip install 'llm3[aot]'")


def compile_step(stage: Stage, config: MeshConfig, topology: Topology, index: int = 0) -> Compiled:
    """Compile the step of phase number `phase` of a stage. Takes minutes. Raises UserError."""
    check(topology)
    os.environ.update({key: os.environ.get(key, value) for key, value in ALONE.items()})
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology.name).devices
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        raise UserError(f"--topology={topology.name!r}: libtpu has no such one: {error}") from error
    if len(devices) != topology.devices:
        raise UserError(f"--aot: libtpu counts {len(devices)} devices in {topology.name}, not {topology.devices}")
    mesh = make_mesh(vars(config), list(devices), across_hosts=config.across_hosts)
    before = time.perf_counter()
    with jax.set_mesh(mesh):
        phase = stage.phases(mesh)[index]
        lowered = phase.train_step.lower(phase.abstract_state, stage.abstract_batch(mesh))
        try:
            took = lowered.compile().memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return Compiled(refused=str(error).splitlines()[0], seconds=time.perf_counter() - before)
    arguments = took.argument_size_in_bytes
    beside = took.peak_memory_in_bytes - arguments
    return Compiled(arguments, took.temp_size_in_bytes, beside, time.perf_counter() - before)

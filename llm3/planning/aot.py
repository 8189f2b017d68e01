"""Compiles a step with the real TPU compiler, without a TPU, and reads the memory that it reports."""

import importlib.util
import os
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import jax
from jax.experimental import topologies

from llm3.config.schema import MeshConfig
from llm3.distributed.machines import Topology
from llm3.distributed.sharding import make_mesh
from llm3.errors import UserError
from llm3.planning import hlo
from llm3.stages.stage import Stage

# without these, libtpu looks for a TPU in this machine and takes a file lock
NO_TPU_HERE = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


class Compiled(NamedTuple):
    """Bytes on one device as reported by `memory_analysis`, and the seconds of compilation.

    beyond_arguments: peak bytes in use besides the arguments, whose place a step's results take; the compiler checks
    this against the chip's memory. temporary: "temporary" bytes in `memory_analysis`, which may exceed the chip's
    memory. rejection: the compiler's error if the step does not fit. collectives: those of the step.
    """

    arguments: int = 0
    temporary: int = 0
    beyond_arguments: int = 0
    seconds: float = 0.0
    rejection: str = ""
    collectives: tuple[hlo.Found, ...] = ()


def check(topology: Topology) -> None:
    """Raise UserError if this machine cannot compile for the topology."""
    if not topology.is_tpu:
        raise UserError(f"--aot: only TPUs can be compiled for without a device, not {topology.name}")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("--aot: needs the TPU's compiler: pip install 'llm3[aot]'")


def compile_step(stage: Stage, config: MeshConfig, topology: Topology, index: int = 0) -> Compiled:
    """Compile the step of phase number `index` of a stage, which takes minutes. Raises UserError."""
    check(topology)
    os.environ.update({key: os.environ.get(key, value) for key, value in NO_TPU_HERE.items()})
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology.name).devices
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        raise UserError(f"--topology={topology.name!r}: libtpu does not know it: {error}") from error
    if len(devices) != topology.devices:
        raise UserError(f"--aot: libtpu counts {len(devices)} devices in {topology.name}, not {topology.devices}")
    mesh = make_mesh(vars(config), list(devices), across_hosts=config.across_hosts)
    before = time.perf_counter()
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as dump:
        phase = stage.phases(mesh)[index]
        lowered = phase.train_step.lower(phase.abstract_state, stage.abstract_batch(mesh))
        try:
            # the text of the program: jaxlib cannot write that of a TPU with SparseCores
            options: dict[str, str | bool] = {"xla_dump_to": dump, "xla_dump_hlo_as_text": True}
            analysis = lowered.compile(compiler_options=options).memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return Compiled(rejection=str(error).splitlines()[0], seconds=time.perf_counter() - before)
        text = next(Path(dump).glob("*.after_optimizations.txt")).read_text()
    assert analysis is not None  # the TPU compiler always reports memory
    arguments = analysis.argument_size_in_bytes
    # the peak counts arguments in the memory of the host
    beyond = analysis.peak_memory_in_bytes - analysis.host_argument_size_in_bytes - arguments
    seconds = time.perf_counter() - before
    return Compiled(arguments, analysis.temp_size_in_bytes, beyond, seconds, collectives=tuple(hlo.collectives(text)))

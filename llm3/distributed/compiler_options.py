"""XLA's options for a train step on several accelerators, so that its collectives overlap with computation.

They are options of one program (`compiler_options` of `jax.jit`), so that no launch script has to set them. An option
that $XLA_FLAGS or $LIBTPU_INIT_ARGS names keeps the value that it has there.
"""

import functools
import os
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

SCHEDULED = {"xla_tpu_enable_latency_hiding_scheduler": True}  # starts collectives early, and waits for them late
# a collective as a program of the SparseCores, while the TensorCores compute
ON_SPARSE_CORES = SCHEDULED | {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": True,  # along two dimensions of the torus, and three
    "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": True,
}
# without SparseCores for it, a collective in steps inside a matmul that does not need it; libtpu refuses it elsewhere
IN_MATMULS = SCHEDULED | {
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
    "xla_enable_async_all_gather": True,
}
GPU = {
    "xla_gpu_enable_latency_hiding_scheduler": True,
    # gather the parameters of the next layer of a scan, and reduce the gradients of the last one, during this layer
    "xla_gpu_enable_pipelined_all_gather": True,
    "xla_gpu_enable_pipelined_reduce_scatter": True,
    "xla_gpu_enable_pipelined_all_reduce": True,
}
# by platform and kind of device, of which the first that starts with the name counts
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "tpu": {
        "TPU v5 lite": IN_MATMULS,
        "TPU v5e": IN_MATMULS,
        "TPU v5": ON_SPARSE_CORES,
        "TPU v6": ON_SPARSE_CORES,
        "TPU7x": ON_SPARSE_CORES,
        "": SCHEDULED,
    },
    "gpu": {"": GPU},
}
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")  # where a user sets options


class StepOptions(NamedTuple):
    """used: for `compiler_options` of `jax.jit`. notes: for the user, on options that this compiler does not take."""

    used: dict[str, Any]
    notes: tuple[str, ...] = ()


def step_options(mesh: Any) -> StepOptions:
    """The options of a train step on a mesh: none on one device, on CPUs and on an abstract mesh."""
    devices = [] if isinstance(mesh, jax.sharding.AbstractMesh) else list(mesh.devices.flat)
    if len(devices) < 2 or devices[0].platform not in OPTIONS:
        return StepOptions({})
    own = next((each for each in devices if each.process_index == jax.process_index()), devices[0])
    set_by_user = re.findall(r"--(\w+)", " ".join(os.environ.get(name, "") for name in VARIABLES))
    table = next(each for kind, each in OPTIONS[own.platform].items() if own.device_kind.startswith(kind))
    wanted = {name: value for name, value in table.items() if name not in set_by_user}
    return known(tuple(wanted.items()), own)


@functools.cache
def known(wanted: tuple[tuple[str, Any], ...], device: Any) -> StepOptions:
    """The wanted options that the compiler of a device takes; any other would end the compilation."""
    options, notes = dict(wanted), list[str]()
    while error := _refusal(options, device):
        found = re.search(r"No such compile option: '(\w+)'", error)
        if found is None or found[1] not in options:
            reason = error.splitlines()[0]
            return StepOptions({}, (*notes, f"XLA refuses the options for overlapping collectives: {reason}"))
        notes.append(f"this XLA has no option {found[1]}: collectives may overlap less")
        del options[found[1]]
    return StepOptions(options, tuple(notes))


def _refusal(options: dict[str, Any], device: Any) -> str:
    """Why a small program does not compile with these options, "" if it does."""
    program = jax.jit(jnp.negative, compiler_options=options)
    alone = Mesh(np.array([device]), ("one",))
    with jax.set_mesh(alone):
        lowered = program.lower(jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(alone, PartitionSpec())))
    try:
        lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return str(error)
    return ""

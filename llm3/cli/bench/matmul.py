"""The rate of a large matmul: what a step could reach at most, on a chip whose peak nobody states."""

import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llm3.distributed.sharding import named
from llm3.models.kernels import dot
from llm3.stages.session import Session

CHAINED, TIMES = 4, 5  # products in a program, and programs


class Peak(NamedTuple):
    """FLOP/s of all devices together; source: "stated" by the maker, or "measured" here."""

    flops_per_second: float
    source: str


def matmul_peak(session: Session) -> Peak:
    """The stated peak of a known chip, else the best rate of square matmuls in the compute dtype."""
    if session.peak_flops:
        return Peak(session.peak_flops, "stated")
    sizes = (1024,) if jax.default_backend() == "cpu" else (4096, 8192)
    return Peak(max(_rate(session, size) for size in sizes), "measured")


def _rate(session: Session, size: int) -> float:
    """FLOP/s of all devices: each multiplies its own [size, size] by a matrix that all of them have."""
    devices, dtype, mesh = jax.device_count(), session.experiment.compute_dtype, session.mesh
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))

    def chain(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, CHAINED, lambda _, x: dot(x, w, ((1,), (0,))).astype(x.dtype), x)

    def make() -> tuple[jax.Array, jax.Array]:
        return jnp.ones((devices * size, size), dtype), jnp.full((size, size), 1 / size, dtype)

    x, w = jax.jit(make, out_shardings=(rows, named(mesh)))()
    program = jax.jit(chain, out_shardings=rows)
    jax.block_until_ready(program(x, w))
    seconds = []
    for _ in range(TIMES):
        before = time.perf_counter()
        jax.block_until_ready(program(x, w))
        seconds.append(time.perf_counter() - before)
    return CHAINED * 2 * devices * size**3 / min(seconds)

"""Meshes over the fake devices."""

import jax

from llm3.distributed.sharding import make_mesh


def mesh_of(count: int, **sizes: int):
    """A mesh over the first `count` fake devices."""
    return make_mesh(sizes, jax.devices()[:count])

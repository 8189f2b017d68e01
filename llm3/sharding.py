"""The mesh, the table from logical axes to mesh axes, and placing arrays by it."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llm3.errors import UserError
from llm3.tree import map_with_path

MESH_AXES = ("data", "fsdp", "tensor")

# Every parameter and activation names its axes by meaning; this table says where each of them is cut.
LOGICAL_AXES: Mapping[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "length": None,
    "layers": None,
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "classes": None,
}


def mesh_shape(sizes: Mapping[str, int], devices: int) -> dict[str, int]:
    """The size of each mesh axis, a single -1 filled with what is left of `devices`. Raises UserError."""
    shape = {axis: sizes[axis] for axis in MESH_AXES}
    for axis, size in shape.items():
        if size < 1 and size != -1:
            raise UserError(f"mesh.{axis}={size}: expected a positive size, or -1 for the devices that are left")
    free = [axis for axis, size in shape.items() if size == -1]
    fixed = math.prod(size for size in shape.values() if size != -1)
    if len(free) > 1:
        raise UserError(f"mesh: only one axis can be -1, not {' and '.join(free)}")
    if devices % fixed or (not free and fixed != devices):
        raise UserError(f"mesh {shape} does not fit {devices} devices: the sizes must multiply to {devices}")
    return {axis: devices // fixed if size == -1 else size for axis, size in shape.items()}


def make_mesh(sizes: Mapping[str, int], devices: list | None = None) -> Mesh:
    """A mesh over `devices` (default: all of them). Raises UserError where the sizes do not fit."""
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(sizes, len(devices))
    return jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * len(shape), devices=devices)


def spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """The partition of an array whose axes have these logical names."""
    return PartitionSpec(*(LOGICAL_AXES[axis] if axis else None for axis in axes))


def named(mesh: Mesh, *axes: str | None) -> NamedSharding:
    """The sharding of an array whose axes have these logical names."""
    return NamedSharding(mesh, spec(axes))


def constrain(array: jax.Array, *axes: str | None) -> jax.Array:
    """Pin an activation to the mesh that is in force (`jax.set_mesh`); without one, leave it."""
    mesh = jax.sharding.get_abstract_mesh()
    return array if mesh.empty else jax.lax.with_sharding_constraint(array, spec(axes))


def axis_size(mesh: Mesh, axis: str) -> int:
    """How many pieces a logical axis is cut into on this mesh."""
    names = LOGICAL_AXES[axis]
    names = () if names is None else (names,) if isinstance(names, str) else names
    return math.prod(mesh.shape[name] for name in names)


def tree_shardings(mesh: Mesh, abstract: dict, axes: dict) -> dict:
    """The sharding of every leaf of a parameter tree, given the tuple of logical names of each leaf.

    Raises UserError for a leaf that the mesh does not divide.
    """

    def one(path: str, leaf: Any, names: tuple[str | None, ...]) -> NamedSharding:
        for size, name in zip(leaf.shape, names, strict=True):
            if name and size % axis_size(mesh, name):
                raise UserError(
                    f"{path}: its axis '{name}' of size {size} cannot be cut into {axis_size(mesh, name)} "
                    f"(mesh {dict(mesh.shape)}): choose a size that it divides, or another mesh"
                )
        return named(mesh, *names)

    return map_with_path(one, abstract, axes)


def place_batch(mesh: Mesh, batch: Any) -> Any:
    """Numpy arrays [batch, length], the same on every process, as global arrays: each process places its own part."""
    sharding = named(mesh, "batch", "length")
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda at: np.asarray(x)[at]), batch)


def check_batch(mesh: Mesh, batch_size: int, micro_batches: int, where: str) -> None:
    """Raise UserError unless the mesh divides every micro-batch."""
    pieces = axis_size(mesh, "batch")
    if batch_size % (pieces * micro_batches):
        raise UserError(
            f"{where}.batch_size={batch_size}: expected a multiple of {pieces * micro_batches} = {pieces} "
            f"(mesh data x fsdp) x {micro_batches} (micro_batches)"
        )


def rows_of_process(mesh: Mesh, batch_size: int) -> list[int]:
    """The rows of the global batch that the devices of this process need, ascending."""
    places = named(mesh, "batch").addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for (rows,) in places for row in range(batch_size)[rows]})


def place_rows(mesh: Mesh, batch_size: int, local: Any) -> Any:
    """Numpy arrays [rows of `rows_of_process`, length] as global arrays [batch_size, length] on the mesh."""
    sharding, rows = named(mesh, "batch", "length"), rows_of_process(mesh, batch_size)

    def place(array: np.ndarray) -> jax.Array:
        def piece(index: tuple[slice, slice]) -> np.ndarray:
            wanted = range(batch_size)[index[0]]
            first = rows.index(wanted[0])
            return array[first : first + len(wanted), index[1]]

        return jax.make_array_from_callback((batch_size, array.shape[1]), sharding, piece)

    return jax.tree.map(place, local)

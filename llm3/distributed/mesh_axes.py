"""The axes of the mesh, and the table from logical axes to mesh axes. Nothing here imports jax."""

import math
from collections.abc import Mapping
from typing import Any

from llm3.errors import UserError, nearest

MESH_AXES = ("data", "fsdp", "context", "tensor")
Rules = Mapping[str, tuple[str, ...]]

# Parameters and activations name their axes by meaning; this table maps each name to the mesh axes that shard it.
LOGICAL_AXES: Rules = {
    "batch": ("data", "fsdp"),
    "length": ("context",),  # positions of a window; outside attention, each is computed where it lies
    "residual": ("context", "tensor"),  # positions between blocks of matmuls: see `residual` in sharding.py
    "keys": (),  # positions that attention reads: gathered from all shards of a window
    "layers": (),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "classes": (),
}


def table(changes: Mapping[str, Any]) -> Rules:
    """`LOGICAL_AXES` changed by a config: {logical axis: a mesh axis, a list of them, or None}.

    Raises UserError for an unknown name.
    """
    rules = dict(LOGICAL_AXES)
    for name, cut in changes.items():
        where = f"config.mesh.rules.{name}"
        if name not in rules or name == "layers":  # the layer scan needs all layers on every device
            raise UserError(f"{where}: no such axis; {nearest(name, rules.keys() - {'layers'})}")
        axes = () if cut is None else (cut,) if isinstance(cut, str) else cut
        if not isinstance(axes, list | tuple) or len(set(map(str, axes))) < len(axes):
            raise UserError(f"{where}={cut!r}: expected a mesh axis, a list of different ones, or None")
        for axis in axes:
            if axis not in MESH_AXES:
                raise UserError(f"{where}={cut!r}: no mesh axis {axis!r}; {nearest(axis, MESH_AXES)}")
        rules[name] = tuple(axes)
    return rules


def check_across_hosts(axis: str) -> None:
    """Raise UserError unless `axis` is a mesh axis or empty."""
    if axis and axis not in MESH_AXES:
        raise UserError(f"config.mesh.across_hosts={axis!r}: no such mesh axis; {nearest(axis, MESH_AXES)}")


def mesh_shape(sizes: Mapping[str, int], devices: int) -> dict[str, int]:
    """The size of each mesh axis (default 1); a single -1 takes the remaining `devices`. Raises UserError."""
    shape = {axis: sizes.get(axis, 1) for axis in MESH_AXES}
    for axis, size in shape.items():
        if size < 1 and size != -1:
            raise UserError(f"mesh.{axis}={size}: expected a positive size, or -1 for the remaining devices")
    free = [axis for axis, size in shape.items() if size == -1]
    fixed = math.prod(size for size in shape.values() if size != -1)
    if len(free) > 1:
        raise UserError(f"mesh: only one axis can be -1, not {' and '.join(free)}")
    if devices % fixed or (not free and fixed != devices):
        raise UserError(f"mesh {shape} does not fit {devices} devices: the sizes must multiply to {devices}")
    return {axis: devices // fixed if size == -1 else size for axis, size in shape.items()}

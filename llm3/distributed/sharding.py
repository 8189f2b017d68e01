"""The mesh, the table from logical axes to mesh axes, and the placement of arrays on the mesh."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llm3.distributed.mesh_axes import LOGICAL_AXES, MESH_AXES, Rules, check_across_hosts, mesh_shape
from llm3.errors import UserError
from llm3.tree import map_with_path, smallest_factor

# axes that stay whole on a mesh that does not divide them: few heads of keys and values serve many devices
WHOLE_IF_UNEVEN = ("kv_heads",)
_rules: Rules = LOGICAL_AXES  # the active table; like the active mesh of jax, but shared by all threads


@contextmanager
def rules_in_force(rules: Rules) -> Iterator[None]:
    """Make `rules` the active table while this context lasts."""
    global _rules
    before, _rules = _rules, rules
    try:
        yield
    finally:
        _rules = before


def make_mesh(
    sizes: Mapping[str, int],
    devices: list | None = None,
    *,
    across_hosts: str = "",
    islands: Sequence[list] | None = None,
) -> Mesh:
    """A mesh over `devices` (default: all). Raises UserError if the sizes do not fit.

    across_hosts: the axis that spans the `islands`, groups of devices with a slow network between them. All other axes
    stay inside one island. Empty: in the order of the devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(sizes, len(devices))
    grid = arranged(shape, across_hosts, islands or [devices])
    return Mesh(grid, tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def arranged(shape: Mapping[str, int], outer: str, islands: Sequence[list]) -> np.ndarray:
    """The devices in the shape of a mesh; only the axis `outer` spans several islands. Raises UserError.

    Inside an island, `mesh_utils` orders the devices by the topology of the chips.
    """
    check_across_hosts(outer)
    if not outer or len(islands) == 1:
        return mesh_utils.create_device_mesh(tuple(shape.values()), [each for island in islands for each in island])
    if len({len(island) for island in islands}) > 1:
        raise UserError(f"config.mesh.across_hosts={outer!r}: the hosts have {[len(each) for each in islands]} devices")
    if shape[outer] % len(islands):
        raise UserError(
            f"config.mesh.across_hosts={outer!r}: mesh.{outer} is {shape[outer]}: expected a multiple of "
            f"{len(islands)}, the number of hosts (or slices)"
        )
    inner = tuple(size // len(islands) if axis == outer else size for axis, size in shape.items())
    parts = [mesh_utils.create_device_mesh(inner, island) for island in islands]
    return np.concatenate(parts, axis=MESH_AXES.index(outer))


def spec(axes: Sequence[str | None], shape: Sequence[int] | None = None, mesh: Any = None) -> PartitionSpec:
    """The partition of an array with these logical axes.

    Given a shape, axes that do not divide stay whole, and mesh axes along which a `shard_map` has cut the array already
    are left out.
    """
    cuts = [_rules[axis] if axis else () for axis in axes]
    if shape is not None:
        cuts = [tuple(each for each in cut if each not in mesh.manual_axes) for cut in cuts]
        pieces = [math.prod(mesh.shape[each] for each in cut) for cut in cuts]
        cuts = [cut if size % count == 0 else () for cut, size, count in zip(cuts, shape, pieces, strict=True)]
    return PartitionSpec(*(cut[0] if len(cut) == 1 else cut or None for cut in cuts))


def named(mesh: Mesh, *axes: str | None, shape: Sequence[int] | None = None) -> NamedSharding:
    """The sharding of an array with these logical axes; shape: as in `spec`."""
    return NamedSharding(mesh, spec(axes, shape, mesh))


def over_all_devices(shape: Sequence[int], stored: Sequence[int] | None = None) -> NamedSharding:
    """A sharding of an array over all devices, in parts as equal and as small as its shape allows.

    stored: the shape of the pieces in which a file holds it, which are cut only if there are too few of them.
    """
    devices, cuts = jax.devices(), [1] * len(shape)
    sizes: list[int] = []
    spec: list[list[str]] = [[] for _ in shape]
    while math.prod(sizes) < len(devices):
        factor = smallest_factor(len(devices) // math.prod(sizes))
        parts = [size / (cut * factor) for size, cut in zip(shape, cuts, strict=True)]
        axes = [axis for axis, part in enumerate(parts) if part and part.is_integer()]
        if axes:
            axis = max(axes, key=lambda axis: (not stored or parts[axis] % stored[axis] == 0, parts[axis]))
            spec[axis].append(f"{len(sizes)}")
            cuts[axis] *= factor
        sizes.append(factor)
    mesh = Mesh(np.array(devices).reshape(sizes), [f"{axis}" for axis in range(len(sizes))])
    return NamedSharding(mesh, PartitionSpec(*map(tuple, spec)))


def constrain(array: jax.Array, *axes: str | None) -> jax.Array:
    """Constrain the sharding of an activation on the active mesh (`jax.set_mesh`), if there is one.

    An axis that the mesh does not divide, such as the single token of a decoding step, is replicated.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return array if mesh.empty else jax.lax.with_sharding_constraint(array, spec(axes, array.shape, mesh))


def residual(x: jax.Array) -> jax.Array:
    """Constrain the residual stream [B, T, D].

    Between matmuls that `tensor` cuts, it cuts the positions instead (Korthikanti et al. 2022, "Reducing activation
    recomputation in large transformer models", section 4.2.2): norms are computed on shards, and a sum over `tensor`
    is a reduce-scatter. Positions that `tensor` does not divide are not cut by it.
    """
    return constrain(x, "batch", "residual" if _cuts_residual(x.shape[1]) else "length", None)


def scattered(x: jax.Array) -> jax.Array:
    """What a matmul or a lookup adds to the residual stream, [B, T, D]: cut as the stream is, if `tensor` cuts both."""
    # in one step, XLA would gather what `context` or `tensor` cuts instead of a sum over `tensor`
    return residual(constrain(x, "batch", "length", None)) if _cuts_residual(x.shape[1]) else x


def gathered(x: jax.Array, *axes: str | None) -> jax.Array:
    """What a matmul reads of the residual stream or makes of it, [B, T, *axes], gathered over `tensor` if that is cut.

    axes: the logical axes after the positions, along which `tensor` cuts it instead.
    """
    return constrain(x, "batch", "length", *axes) if _cuts_residual(x.shape[1]) else x


def _cuts_residual(positions: int) -> bool:
    """Whether the active mesh cuts the positions of the residual stream more than those that matmuls read."""
    cut = cut_along("residual", positions)
    return len(cut) > len(cut_along("length", positions)) and not set(cut) & set(_rules["batch"])


def sum_over_data(function: Callable[..., Any], whole: tuple, key: jax.Array, batch: Any) -> Any:
    """function(*whole, key, batch), a tree of sums over rows, with one all-reduce along the mesh axis `data`.

    Otherwise, every sum inside is reduced where it is made, once per micro-batch. Each shard of `data` computes on its
    own rows, with a random key of its own. whole: trees that `data` does not shard. batch: arrays whose first axis is
    the rows. On a mesh of which `sums_over_data_once` is false, this is function(*whole, key, batch).
    """
    if not sums_over_data_once(jax.sharding.get_abstract_mesh()):
        return function(*whole, key, batch)

    def local(whole: tuple, key: jax.Array, batch: Any) -> Any:
        own_key = jax.random.fold_in(key, jax.lax.axis_index("data"))
        return jax.lax.psum(function(*whole, own_key, batch), "data")

    specs = PartitionSpec(), PartitionSpec(), PartitionSpec("data")
    # with check_vma, jax would reduce the gradient of what `data` does not shard where it is made
    sums = jax.shard_map(local, in_specs=specs, out_specs=PartitionSpec(), axis_names={"data"}, check_vma=False)
    return sums(whole, key, batch)


def sums_over_data_once(mesh: Any) -> bool:
    """Whether `sum_over_data` reduces once: on a mesh of `data`, with or without `fsdp`.

    If the vocabulary or windows are sharded too, XLA's partitioner (jaxlib 0.10) aborts on gathers in a `shard_map`.
    """
    if mesh.empty or mesh.shape["data"] == 1 or "data" not in _rules["batch"] or "data" in _rules["embed"]:
        return False
    return all(axis_size(mesh, axis) == 1 for axis in _rules if axis not in ("batch", "embed"))


def axis_size(mesh: Any, axis: str) -> int:
    """The number of shards of a logical axis on this mesh; 1 on an empty mesh."""
    return 1 if mesh.empty else math.prod(mesh.shape[name] for name in _rules[axis])


def shards(mesh: Any, axis: str, size: int) -> int:
    """The number of shards of a logical axis of this size: 1 if it stays whole because the mesh does not divide it."""
    count = axis_size(mesh, axis)
    return 1 if axis in WHOLE_IF_UNEVEN and size % count else count


def whole_axis_note(mesh: Any, axis: str, size: int) -> list[str]:
    """A note that a logical axis of this size stays whole, if it does."""
    count = axis_size(mesh, axis)
    if shards(mesh, axis, size) == count:
        return []
    return [f"every device holds all {size} {axis}: mesh {' x '.join(_rules[axis])}={count} does not divide them"]


def is_cut(axis: str) -> bool:
    """Whether the active mesh shards a logical axis."""
    return axis_size(jax.sharding.get_abstract_mesh(), axis) > 1


def pieces(axis: str, size: int) -> int:
    """The number of pieces into which the active mesh, and a `shard_map`, cut a logical axis of this size."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[name] for name in cut_along(axis, size))


def cut_along(axis: str, size: int) -> tuple[str, ...]:
    """The axes of the active mesh that shard a logical axis of this size: none if they do not divide it.

    Mesh axes along which a `shard_map` has cut the array already are left out.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return ()
    (cut,) = spec((axis,), (size,), mesh)
    names = (cut,) if isinstance(cut, str) else cut or ()
    return tuple(name for name in names if mesh.shape[name] > 1)


def tree_shardings(mesh: Mesh, abstract: dict, axes: dict) -> dict:
    """The sharding of every leaf of a parameter tree, given the logical axes of each leaf.

    Axes in `WHOLE_IF_UNEVEN` stay whole if the mesh does not divide them. Raises UserError for a leaf with another axis
    that it does not divide, or that the table shards twice along one mesh axis.
    """

    def one(path: str, leaf: Any, names: tuple[str | None, ...]) -> NamedSharding:
        for size, name in zip(leaf.shape, names, strict=True):
            if name and size % shards(mesh, name, size):
                pad = " (config.model.vocab_multiple pads the vocabulary)" if name == "vocab" else ""
                raise UserError(
                    f"{path}: its axis '{name}' of size {size} cannot be cut into {axis_size(mesh, name)} "
                    f"(mesh {dict(mesh.shape)}): choose a size that the mesh divides{pad}, another mesh, or "
                    f"config.mesh.rules.{name}=None, which leaves it whole"
                )
        names = tuple(
            name if name and shards(mesh, name, size) == axis_size(mesh, name) else None
            for size, name in zip(leaf.shape, names, strict=True)
        )
        used = [axis for name in names if name for axis in _rules[name]]
        if twice := {axis for axis in used if used.count(axis) > 1}:
            raise UserError(f"{path}: config.mesh.rules shards it twice along {', '.join(sorted(twice))}: axes {names}")
        return named(mesh, *names)

    return map_with_path(one, abstract, axes)


def with_sharding(shapes: Any, shardings: Any) -> Any:
    """The shapes with their shardings attached."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def place_batch(mesh: Mesh, batch: Any) -> Any:
    """Numpy arrays [batch, length, ...], equal on every process, as global arrays; each process places its own shards.

    Arrays [batch] have no length.
    """

    def place(x: np.ndarray) -> jax.Array:
        axes = ("batch", "length", *(None,) * x.ndim)[: x.ndim]
        sharding = named(mesh, *axes, shape=x.shape)
        return jax.make_array_from_callback(x.shape, sharding, lambda at: np.asarray(x)[at])

    return jax.tree.map(place, batch)


def check_batch(mesh: Mesh, batch_size: int, length: int, micro_batches: int, where: str) -> None:
    """Raise UserError unless the mesh divides every micro-batch and every window."""
    pieces = axis_size(mesh, "batch")
    if batch_size % (pieces * micro_batches):
        raise UserError(
            f"{where}.batch_size={batch_size}: expected a multiple of {pieces * micro_batches} = {pieces} "
            f"(mesh {' x '.join(_rules['batch'])}) x {micro_batches} (micro_batches)"
        )
    if length % (pieces := axis_size(mesh, "length")):
        cut = " x ".join(_rules["length"])
        raise UserError(f"{where}.sequence_length={length}: expected a multiple of {pieces} (mesh {cut})")


def rows_of_process(mesh: Mesh, batch_size: int) -> list[int]:
    """The rows of the global batch that the devices of this process need, ascending."""
    indices = named(mesh, "batch").addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for index in indices if index is not None for row in range(batch_size)[index[0]]})


def place_rows(mesh: Mesh, batch_size: int, local: Any) -> Any:
    """Numpy arrays [rows of `rows_of_process`, length] as global arrays [batch_size, length] on the mesh."""
    sharding, rows = named(mesh, "batch", "length"), rows_of_process(mesh, batch_size)

    def place(array: np.ndarray) -> jax.Array:
        def piece(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None, "every device holds a shard"
            wanted = range(batch_size)[index[0]]
            first = rows.index(wanted[0])
            return array[first : first + len(wanted), index[1]]

        return jax.make_array_from_callback((batch_size, array.shape[1]), sharding, piece)

    return jax.tree.map(place, local)

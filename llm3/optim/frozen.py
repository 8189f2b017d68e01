"""How frozen parameters are stored during training: in float32, in the compute dtype, or in 8 or 4 bits.

Only leaves that the model casts to the compute dtype anyway are stored in lower precision, so "compute" changes no
result. Leaves that norms, task heads and DoRA's column norms read, and biases, stay in float32.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

from llm3.distributed.memory import HOST, on_device
from llm3.models.quantized import CODEBOOKS, Quantized, quantize
from llm3.segments import in_stack
from llm3.tree import flatten, map_with_path, unflatten


class Storage(NamedTuple):
    """store: converts a segmented float32 tree of frozen leaves. abstract: its result, as shapes with shardings."""

    store: Callable[[dict], dict]
    abstract: dict


def make_storage(
    frozen: dict,
    shardings: dict,
    kind: str,
    compute_dtype: str,
    exact: frozenset[str] = frozenset(),
    in_host: bool = False,
) -> Storage:
    """The storage of a frozen tree (of shapes). kind: float32, compute, int8 or nf4. Raises UserError.

    int8 and nf4 apply to the kernels of the layers; other leaves are then stored in the compute dtype. exact: names of
    projections whose kernels and adapters the model reads in float32. in_host: the layers wait in the host's memory.
    """

    def one(path: str, leaf: jax.Array) -> Any:
        if kind == "float32" or not computed_low(path):
            return leaf
        if kind in CODEBOOKS and in_stack(path) and path.endswith("/kernel"):
            return quantize(leaf, kind, _blocked_axis(path, leaf.ndim))
        if not exact.isdisjoint(path.split("/")):
            return leaf
        return leaf.astype(compute_dtype)

    def store(tree: dict) -> dict:
        return map_with_path(one, tree)

    shapes = jax.eval_shape(store, frozen)
    flat = flatten(shardings)

    def sharding(path: str, part: Any) -> NamedSharding:
        found = fitting(flat[path], part.shape)
        return found.with_memory_kind(HOST) if in_host and in_stack(path) else found

    fitted = map_with_path(lambda path, x: jax.tree.map(partial(sharding, path), x), shapes)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, fitted)
    changes = kind != "float32" or in_host
    return Storage(jax.jit(store, out_shardings=fitted) if changes else lambda tree: tree, abstract)


def dequantized(stored: dict) -> dict:
    """The tree on the device, with quantised leaves dequantised to float32; other values do not change."""
    flat = flatten(on_device(stored))
    return unflatten(flat | _values({path: x for path, x in flat.items() if isinstance(x, Quantized)}))


def rounded(frozen: dict, storage: Storage) -> dict:
    """A float32 frozen tree, in which the leaves that `storage` quantises have their dequantised values."""
    stored = flatten(on_device(storage.store(frozen)))
    return unflatten(flatten(frozen) | _values({path: x for path, x in stored.items() if isinstance(x, Quantized)}))


@jax.jit
def _values(quantised: dict[str, Quantized]) -> dict[str, jax.Array]:
    return {path: x.dequantized() for path, x in quantised.items()}


def computed_low(path: str) -> bool:
    """Whether the model casts a leaf to the compute dtype before use.

    Norms, task heads with their pooler, biases and token types stay float32.
    """
    *parents, name = path.split("/")
    if parents[0] in ("head", "pooler") or parents[-1].endswith("norm"):
        return False
    return name in ("kernel", "embedding", "position", "a", "b")


def _blocked_axis(path: str, rank: int) -> int:
    """The last input axis of a stacked kernel: 1 of [L, D, heads, head_dim], 2 of `out`, [L, heads, head_dim, D]."""
    return -3 if rank == 4 and path.split("/")[-2] != "out" else -2


def fitting(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding without mesh axes that do not divide the shape: an axis of scales is shorter than its kernel's."""

    def pieces(names: Any) -> int:
        return math.prod(sharding.mesh.shape[each] for each in ((names,) if isinstance(names, str) else names or ()))

    spec = [names if size % pieces(names) == 0 else None for names, size in zip(sharding.spec, shape, strict=False)]
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))

"""A small tree of parameters and its optimizer state, saved, compared and damaged."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from llm3.checkpoints.stage_checkpoints import Checkpoints, Restored, Wanted
from llm3.tree import map_with_path, unflatten


def parameters(seed: int = 0, scale: int = 1) -> dict:
    random = np.random.default_rng(seed)
    shapes = {"embed/embedding": (64 * scale, 32), "layers/0:2/mlp/up/kernel": (2, 32, 64 * scale), "norm/scale": (32,)}
    flat = {path: jnp.asarray(random.standard_normal(shape), jnp.float32) for path, shape in shapes.items()}
    return unflatten(flat | {"head/bias": jnp.asarray(random.standard_normal(5), jnp.bfloat16)})


def optimizer_state(params: dict) -> object:
    transform = optax.adamw(1e-3, mask=map_with_path(lambda path, _: path.endswith("kernel"), params))
    return jax.jit(lambda params: transform.update(params, transform.init(params), params)[1])(params)


def same(tree: object, other: object) -> bool:
    """Equal structure, dtypes and bytes."""
    if jax.tree.structure(tree) != jax.tree.structure(other):
        return False
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    return all(a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def abstract(tree: object) -> object:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


PARAMS = parameters()
OPT = optimizer_state(PARAMS)


def newest(checkpoints: Checkpoints) -> Restored | None:
    return checkpoints.load_newest(lambda _: Wanted(abstract(PARAMS), abstract(OPT)))


def save_two_steps(directory: Path) -> Path:
    """Steps 10 (PARAMS) and 20 (twice PARAMS)."""
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(10, PARAMS, OPT, {"tokens": 10})
        checkpoints.save(20, jax.tree.map(lambda x: 2 * x, PARAMS), OPT, {"tokens": 20})
    return directory


def data_files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def largest(directory: Path) -> Path:
    """The file that holds the arrays of a part: not what is left of the writing process."""
    return max((directory / "d").iterdir(), key=lambda path: path.stat().st_size)


def flip(path: Path, position: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(position * (len(content) - 1))] ^= 0x10
    path.write_bytes(content)


def on_mesh(tree: object, *shape: int) -> object:
    """The last axis of every leaf over fsdp and tensor where it divides, on a mesh data x fsdp x tensor."""
    devices = jax.devices()[: int(np.prod(shape))]
    mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=devices)

    def place(leaf: jax.Array) -> jax.Array:
        divides = leaf.ndim and leaf.shape[-1] % (shape[1] * shape[2]) == 0
        spec = PartitionSpec(*[None] * (leaf.ndim - 1), ("fsdp", "tensor")) if divides else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(place, tree)


def sharded(tree: object) -> object:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


HARMS = {"delete": Path.unlink, "halve": halve, "flip": flip}

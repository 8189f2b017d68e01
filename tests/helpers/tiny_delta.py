"""A stage with frozen parameters: its start, its trainable leaves and its delta checkpoints."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from llm3.checkpoints.stage_checkpoints import Checkpoints, Restored, Wanted
from llm3.segments import segmented
from llm3.tree import flatten, unflatten
from tests.helpers.tiny_checkpoints import abstract, data_files

SHAPES = {
    "embed/embedding": (64, 8),
    "layers/mlp/up/kernel": (4, 8, 16),
    "layers/norm/scale": (4, 8),
    "head/kernel": (8, 3),
    "head/bias": (3,),
}
SEGMENTS = ((0, 1), (1, 2), (2, 4))
TRAINS = {"layers/0:1/mlp/up/kernel", "layers/2:4/mlp/up/kernel", "layers/2:4/norm/scale", "head/kernel", "head/bias"}


def whole(seed: int) -> dict:
    random = np.random.default_rng(seed)
    flat = {path: jnp.asarray(random.standard_normal(shape), jnp.float32) for path, shape in SHAPES.items()}
    return unflatten(flat | {"head/bias": flat["head/bias"].astype(jnp.bfloat16)})


def after(seed: int) -> dict:
    """START with other values where TRAINS says so."""
    params, new = jax.tree.map(np.array, START), jax.tree.map(np.array, whole(seed))
    for layer in (0, 2, 3):
        params["layers"]["mlp"]["up"]["kernel"][layer] = new["layers"]["mlp"]["up"]["kernel"][layer]
    params["layers"]["norm"]["scale"][2:] = new["layers"]["norm"]["scale"][2:]
    return jax.tree.map(jnp.asarray, params | {"head": new["head"]})


def trainable(params: dict) -> dict:
    return unflatten({path: leaf for path, leaf in flatten(segmented(params, SEGMENTS)).items() if path in TRAINS})


def moments(params: dict) -> dict:
    return {"mu": jax.tree.map(lambda x: x / 2, params), "count": jnp.int32(7)}


START = whole(0)
AT = {10: after(1), 20: after(2)}
OPTS = {10: moments(AT[10]["head"]), 20: moments(trainable(AT[20]))}  # as if more leaves became trainable after step 10


def newest(checkpoints: Checkpoints, like: dict = START) -> Restored | None:
    return checkpoints.load_newest(lambda step: Wanted(abstract(like), abstract(OPTS[step])))


def save(checkpoints: Checkpoints, step: int, delta: bool = True) -> None:
    params = trainable(AT[step]) if delta else AT[step]
    checkpoints.save(step, params, OPTS[step], {"tokens": step}, delta=delta)


def reader(stage: Path) -> Checkpoints:
    return Checkpoints(stage / "checkpoints", read_only=True)


def contents(directory: Path) -> dict[str, tuple[int, bytes]]:
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in data_files(directory)}


def save_stage(directory: Path) -> Path:
    """A base, and delta checkpoints of steps 10 and 20."""
    with Checkpoints(directory / "checkpoints") as checkpoints:
        checkpoints.save_base(START, {"tokens": 0})
        save(checkpoints, 10)
        save(checkpoints, 20)
    return directory

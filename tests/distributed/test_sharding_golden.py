"""The sharding of every leaf of a train state on three meshes, as a text that shows any change in review.

`python -m tests.distributed.test_sharding_golden` rewrites tests/distributed/sharding.txt.
"""

import math
from pathlib import Path

import jax
import pytest

from llm3.config.schema import AdapterConfig, StageConfig
from llm3.distributed.mesh_axes import MESH_AXES
from llm3.training.phase import build
from tests.helpers import meshes as conftest
from tests.helpers.tiny import CLASSES, TASK, model_config

GOLDEN = Path(__file__).with_name("sharding.txt")
MESHES = {
    "data=8": {"data": 8},
    "fsdp=4 tensor=2": {"fsdp": 4, "tensor": 2},
    "data=2 fsdp=2 context=2": {"data": 2, "fsdp": 2, "context": 2},
}


def leaves(mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """{path: leaf} of the state of a stage that trains an adapter, the norms, the head and the last of three layers."""
    model = model_config(vocab_size=64, classes=CLASSES, qk_norm="head", attention_bias="all", tie_embeddings=False)
    adapter = AdapterConfig(rank=2, targets=("query", "down"))
    train = ["layers[-1]/.*", "lora", "norms", "embeddings", "head/.*"]
    stage = StageConfig("finetune", {"a": 1.0}, 10, 8, 16, start="x", train=train, adapters={"qa": adapter})
    model = model_config(**vars(model) | {"adapters": (("qa", adapter),)})
    with jax.set_mesh(mesh):
        state = build(stage, model, mesh, task=TASK, fresh=lambda path: True, seed=0, where="stage")[0].abstract_state
    paths = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in paths}


def cuts(leaf: jax.ShapeDtypeStruct) -> str:
    """The mesh axes along which each axis is cut, and the shape that one device holds."""
    spec = [*leaf.sharding.spec, *[None] * (leaf.ndim - len(leaf.sharding.spec))]
    return f"({', '.join('-' if axis is None else str(axis) for axis in spec)}) {leaf.sharding.shard_shape(leaf.shape)}"


def rendered() -> str:
    parts = ["Written by tests/test_sharding_golden.py: leaf, shape, (mesh axis of each axis), shape on one device\n"]
    for name, sizes in MESHES.items():
        parts.append(f"\nmesh {name}\n")
        for path, leaf in leaves(conftest.mesh_of(8, **sizes)).items():
            parts.append(f"{path:<70} {leaf.shape!s:<18} {cuts(leaf)}\n")
    return "".join(parts)


def test_every_leaf_is_sharded_as_in_the_reviewed_text():
    assert rendered() == GOLDEN.read_text(), "if intended: python -m tests.distributed.test_sharding_golden"


@pytest.mark.parametrize("sizes", MESHES.values(), ids=list(MESHES))
def test_large_leaves_are_replicated_along_data_and_context_only(sizes):
    """Only `data` and `context` replicate; the other mesh axes shard every matrix."""
    mesh = conftest.mesh_of(8, **sizes)
    pieces = mesh.size // (mesh.shape["data"] * mesh.shape["context"])
    assert set(mesh.shape) == set(MESH_AXES)
    for path, leaf in leaves(mesh).items():
        if leaf.size >= 1024:
            assert math.prod(leaf.sharding.shard_shape(leaf.shape)) * pieces == leaf.size, path


if __name__ == "__main__":
    GOLDEN.write_text(rendered())

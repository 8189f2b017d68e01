"""FLOPs and traffic per device, as counted by the compiler, do not grow with the number of devices."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest

from llm3.config.schema import ModelConfig, StageConfig
from llm3.data.batch import Batch
from llm3.distributed.sharding import named
from llm3.objectives import Task
from llm3.planning.hlo import collective_bytes
from llm3.training.phase import build
from tests.helpers import tiny_run
from tests.helpers.meshes import mesh_of

LAYERS, D, HEADS, FF, VOCAB, LENGTH = 2, 64, 8, 128, 320, 64
MODEL = ModelConfig(LAYERS, D, HEADS, FF, vocab_size=VOCAB, compute_dtype="float32")


def compiled_step(model: ModelConfig, mesh: jax.sharding.Mesh, rows: int, micro_batches=1) -> jax.stages.Compiled:
    """A step of pretraining on rows of LENGTH tokens."""
    stage = StageConfig("pretrain", {"a": 1.0}, 10, rows, LENGTH, micro_batches=micro_batches)
    task = Task(None, None, LENGTH)
    with jax.set_mesh(mesh):
        phase = build(stage, model, mesh, task=task, fresh=lambda path: True, seed=0, where="stage")[0]
        kinds = [np.float32 if name == "weights" else np.int32 for name in Batch._fields]
        sharding = named(mesh, "batch", "length")
        batch = Batch(*(jax.ShapeDtypeStruct((rows, LENGTH), kind, sharding=sharding) for kind in kinds))
        return phase.train_step.lower(phase.abstract_state, batch).compile()


def expected_bytes(rows: int, data: int = 1, fsdp: int = 1, context: int = 1, tensor: int = 1) -> dict[str, float]:
    """The expected bytes by formula, in float32, without small leaves such as norm scales and scalars.

    This is before the passes of a GPU or TPU compiler: there an all-reduce with a sharded result becomes a
    reduce-scatter, and sums of all-reduces (of the inputs of query, key and value, of gate and up, and of the two uses
    of the embedding) are reduced together.
    """
    layer, embedding = (4 * D * D + 3 * D * FF) / tensor, VOCAB * D / tensor
    tokens = rows / (data * fsdp) * LENGTH
    keys_and_values = 2 * tokens * D / tensor
    activations = tokens / context * D
    gathered = reduced = 0.0
    if fsdp > 1:  # parameters, for the forward and for the backward pass; the embedding for both uses at once
        gathered += 2 * LAYERS * layer + embedding
        reduced += LAYERS * layer  # their gradients, of which each device keeps its own shard
    if data * context > 1:
        reduced += LAYERS * layer / fsdp
    reduced += embedding * ((data * fsdp > 1) + (context > 1))  # as the head
    reduced += embedding / fsdp * (data * context > 1)  # of the lookup, scattered along fsdp before
    scattered = embedding / fsdp * (fsdp > 1)
    if context > 1:  # and their gradients
        gathered += LAYERS * keys_and_values
        reduced += LAYERS * keys_and_values
    if tensor > 1:  # the sums of attention and MLP; the gradients of what the five other projections read; both ends
        reduced += (2 + 5) * LAYERS * activations + 2 * activations
        # what attention and MLP read, and the gradients of what they add; the same at both ends
        gathered += 4 * LAYERS * activations + 2 * activations
    return {"all-gather": 4 * gathered, "all-reduce": 4 * reduced, "reduce-scatter": 4 * scattered}


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 8},
        {"fsdp": 8},
        {"context": 8},
        {"tensor": 8},
        {"data": 2, "fsdp": 4},
        {"fsdp": 4, "tensor": 2},
        {"fsdp": 2, "context": 2, "tensor": 2},
    ],
    ids=lambda sizes: " ".join(f"{axis}={size}" for axis, size in sizes.items()),
)
def test_the_bytes_of_collectives_on_a_device_are_those_of_the_formula(sizes):
    rows = 8
    text = compiled_step(MODEL, mesh_of(8, **sizes), rows).as_text()
    found, expected = collective_bytes(text), expected_bytes(rows, **sizes)
    assert found.keys() <= expected.keys(), "no all-to-all or permute"
    for kind, size in expected.items():
        assert found.get(kind, 0) == pytest.approx(size, rel=0.02, abs=4 * 1024), kind


@pytest.mark.slow
def test_gradients_of_micro_batches_are_reduced_over_data_once_a_step():
    text = compiled_step(MODEL, mesh_of(8, data=8), 32, micro_batches=4).as_text()
    gradients = 4 * (LAYERS * (4 * D * D + 3 * D * FF) + VOCAB * D)  # both uses of the embedding together
    assert collective_bytes(text) == {"all-reduce": pytest.approx(gradients, rel=0.02)}


@pytest.mark.slow
def test_a_head_in_blocks_is_gathered_as_often_and_scatters_its_gradient_once_a_micro_batch():
    mesh, micro_batches, kernel = mesh_of(8, data=2, fsdp=4), 2, 4 * VOCAB * D
    whole, blocks = (
        collective_bytes(compiled_step(replace(MODEL, vocab_block=block), mesh, 32, micro_batches).as_text())
        for block in (0, 64)
    )
    assert blocks["all-gather"] == whole["all-gather"]
    assert blocks["reduce-scatter"] == whole["reduce-scatter"] + micro_batches * kernel / 4  # besides the lookup's
    assert blocks["all-reduce"] == whole["all-reduce"] - micro_batches * kernel


def test_one_device_is_sent_nothing():
    assert collective_bytes(compiled_step(MODEL, mesh_of(1), 1).as_text()) == {}


# (mesh, rows): four rows a device, of which it computes as many pieces as tensor x context cut them into
WEAK = [
    ({}, 4),
    ({"data": 8}, 32),
    ({"data": 64}, 256),
    ({"fsdp": 64}, 256),
    ({"data": 4, "fsdp": 16}, 256),
    ({"fsdp": 32, "tensor": 2}, 128),
    ({"data": 4, "fsdp": 8, "context": 2}, 128),
]


@pytest.mark.slow
def test_from_1_to_64_devices_the_flops_of_a_device_stay_the_same():
    environment = os.environ | {"PYTHONPATH": str(tiny_run.ROOT), "JAX_NUM_CPU_DEVICES": "64"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    flops = dict(zip([str(sizes) for sizes, _ in WEAK], json.loads(done.stdout), strict=True))
    alone = flops["{}"]
    for sizes, _ in WEAK:
        pieces = sizes.get("tensor", 1) * sizes.get("context", 1)
        of_alone = flops[str(sizes)] * pieces / alone
        assert of_alone == pytest.approx(1, rel=0.03), f"{sizes}: {of_alone:.3f} of the FLOPs of one device"


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 64)
    unrolled = ModelConfig(LAYERS, D, HEADS, FF, vocab_size=VOCAB, compute_dtype="float32", scan_unroll=LAYERS)
    meshes = [(mesh_of(int(np.prod(list(sizes.values()) or [1])), **sizes), rows) for sizes, rows in WEAK]
    print(json.dumps([compiled_step(unrolled, mesh, rows).cost_analysis()["flops"] for mesh, rows in meshes]))

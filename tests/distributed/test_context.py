"""Windows sharded over devices give the losses and gradients of one device, under document masks."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llm3.data.batch import Batch
from llm3.distributed.mesh_axes import table
from llm3.distributed.sharding import (
    axis_size,
    check_batch,
    constrain,
    place_batch,
    rules_in_force,
    tree_shardings,
)
from llm3.errors import UserError
from llm3.models.flops import forward_flops, step_flops
from llm3.models.transformer import abstract
from llm3.objectives import causal, classify, prefix
from llm3.segments import canonical, segmented
from llm3.tree import flatten
from tests.helpers.meshes import mesh_of
from tests.helpers.tiny import CLASSES, LENGTH, TASK, jit, make_batch, make_labelled, make_params, model_config

ROWS = 8
MESHES = {
    "one device": {},
    "fsdp and context": {"fsdp": 2, "context": 4},
    "all axes": {"fsdp": 2, "context": 2, "tensor": 2},
    "context": {"context": 8},
    "more tensor than kv_heads": {"data": 2, "tensor": 4},
}
CASES = {
    "causal": (causal, {}),
    "causal, blocks of the vocabulary, remat": (causal, {"vocab_block": 12, "remat": "full"}),
    "prefix": (prefix, {}),
    "classify, bidirectional": (classify, {"causal": False, "pool": "mean", "classes": CLASSES}),
}


@functools.cache
def make(name: str) -> jax.sharding.Mesh:
    return mesh_of(8 if MESHES[name] else 1, **MESHES[name])


@functools.cache
def computed(case: str, mesh_name: str):
    """Loss, flat gradients and compiled program for one batch of packed documents on a mesh."""
    objective, changes = CASES[case]
    config, mesh = model_config(vocab_size=64, **changes), make(mesh_name)
    graph = abstract(config).graph

    def loss(params: dict, batch: Batch) -> jax.Array:
        model = nnx.merge(graph, segmented(params, ((0, config.layers),)))
        sums = objective.loss(model, batch, jax.random.key(0), TASK)
        return sums.loss / sums.weight

    batch = make_labelled(ROWS) if objective is classify else make_batch(ROWS)
    with jax.set_mesh(mesh):
        whole = abstract(config)
        shardings = tree_shardings(mesh, canonical(whole.shapes), canonical(whole.axes))
        arguments = jax.device_put(make_params(config), shardings), place_batch(mesh, batch)
        program = jit(jax.value_and_grad(loss)).lower(*arguments).compile()
        value, gradients = program(*arguments)
        return float(value), flatten(jax.device_get(gradients)), program


@pytest.mark.parametrize("mesh_name", list(MESHES)[1:])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_losses_and_gradients_are_those_of_one_device(case, mesh_name):
    if case != "causal" and mesh_name in ("context", "more tensor than kv_heads"):
        pytest.skip("the other meshes show it")
    expected, expected_gradients, _ = computed(case, "one device")
    loss, gradients, _ = computed(case, mesh_name)
    assert loss == pytest.approx(expected, rel=1e-6)
    for path, gradient in gradients.items():
        np.testing.assert_allclose(gradient, expected_gradients[path], atol=2e-6, err_msg=path)


def test_each_device_computes_the_scores_of_its_own_queries_only():
    """[rows, kv heads, groups, queries, keys]: 8 rows, 2 heads, 2 groups, 16 queries over context=8, all 16 keys."""
    text = computed("causal", "context")[2].as_text()
    shapes = set(re.findall(r"f32\[8,2,2,(\d+),16\]", text))
    assert shapes == {str(LENGTH // 8)}


def test_flops_of_a_sharded_window_count_all_queries_against_all_keys():
    config = model_config()
    whole = sum(step_flops(config, 2, LENGTH, "lm", ((0, 3),), frozenset()))
    cut = sum(step_flops(config, 2, LENGTH, "lm", ((0, 3),), frozenset(), context=2))
    scores = 4 * 2 * LENGTH**2 * config.heads * config.head_dim * config.layers
    assert whole == forward_flops(config, 2, LENGTH, "lm")
    assert cut - whole == scores * 3 / 8, "of four blocks of queries, three eighths of the scores are skipped"


def test_a_length_that_the_mesh_does_not_divide_is_rejected():
    mesh = make("fsdp and context")
    check_batch(mesh, ROWS, 16, 1, "stage")
    with pytest.raises(UserError, match=r"^stage\.sequence_length=18: expected a multiple of 4 \(mesh context\)"):
        check_batch(mesh, ROWS, 18, 1, "stage")


def test_an_axis_that_the_mesh_does_not_divide_is_replicated():
    """Such as the single token of a decoding step."""
    mesh = make("fsdp and context")
    with jax.set_mesh(mesh):
        pinned = jax.jit(lambda x: constrain(x, "batch", "length", None))(jnp.ones((4, 1, 3)))
        assert {each.data.shape for each in pinned.addressable_shards} == {(2, 1, 3)}
        (placed,) = place_batch(mesh, (np.ones((4, 1), np.int32),))
    assert {each.data.shape for each in placed.addressable_shards} == {(2, 1)}


def test_rules_say_where_a_logical_axis_is_cut():
    mesh = make("all axes")
    assert (axis_size(mesh, "batch"), axis_size(mesh, "vocab"), axis_size(mesh, "mlp")) == (2, 2, 2)
    with rules_in_force(table({"batch": ["fsdp", "context"], "length": None, "vocab": ["fsdp", "tensor"], "mlp": ()})):
        assert (axis_size(mesh, "batch"), axis_size(mesh, "vocab"), axis_size(mesh, "mlp")) == (4, 4, 1)
        assert axis_size(mesh, "length") == 1
    assert axis_size(mesh, "batch") == 2, "only as long as they are in force"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"batches": "data"}, r"^config\.mesh\.rules\.batches: no such axis; did you mean 'batch'"),
        ({"layers": "data"}, r"^config\.mesh\.rules\.layers: no such axis"),
        ({"mlp": "tensors"}, r"^config\.mesh\.rules\.mlp='tensors': no mesh axis 'tensors'; did you mean 'tensor'"),
        ({"mlp": ["tensor", "tensor"]}, "expected a mesh axis, a list of different ones, or None"),
        ({"mlp": 3}, "expected a mesh axis, a list of different ones, or None"),
    ],
)
def test_rules_of_unknown_axes_are_rejected(changes, complaint):
    with pytest.raises(UserError, match=complaint):
        table(changes)

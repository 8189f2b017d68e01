"""The formula against the matrix products in the compiler's output for a gradient, to the last FLOP."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from llm3 import objectives
from llm3.config.schema import AdapterConfig
from llm3.data.batch import Batch
from llm3.models.flops import forward_flops, model_flops, step_flops
from llm3.models.transformer import abstract
from llm3.optim.partition import make_partition
from llm3.planning.hlo import computations, rounds
from llm3.registry import load_plugin
from llm3.segments import canonical
from tests.helpers.tiny import CLASSES, TASK, jit, model_config

BATCH, LENGTH = 2, 12


def compiled_step(config, rules, head):
    """The compiled gradient of the trainable leaves, and the partition."""
    found = make_partition(canonical(abstract(config).shapes), rules, config.layers)
    whole = abstract(config, found.segments)
    objective = load_plugin(objectives, "classify" if head == "task" else "causal")

    @jit
    @jax.value_and_grad  # as a step does: without the loss, logits that are computed again would be computed once
    def gradient(trainable, frozen, batch):
        return objective.loss(nnx.merge(whole.graph, trainable, frozen), batch, jax.random.key(0), TASK).loss

    whole_numbers = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    batch = Batch(*[whole_numbers] * 4, jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.float32))
    return gradient.lower(*found.divide(whole.shapes), batch).compile(), found


def product_flops(hlo: str) -> int:
    """Twice the multiply-adds of all dot instructions of an optimised program, each round of a loop counted."""
    total, read, times = 0, 0, rounds(hlo)
    dot = re.compile(r"%?([\w.-]+) = \S+ dot\((?:\S+ )?%?([\w.-]+), .*?lhs_contracting_dims=\{([\d,]+)\}")
    for name, lines in computations(hlo).items():
        found = (re.match(r"\s*(?:ROOT )?%?([\w.-]+) = \w+\[([\d,]*)\]", line) for line in lines)
        sizes = {out: [int(n) for n in dims.split(",") if n] for out, dims in (each.groups() for each in found if each)}
        for out, left, axes in (each for line in lines if " dot(" in line for each in dot.findall(line)):
            product = math.prod(sizes[out]) * math.prod(sizes[left][int(axis)] for axis in axes.split(","))
            total, read = total + 2 * product * times[name], read + 1
    assert read == hlo.count(" dot("), "an instruction that this test cannot read"
    return total


ALL_LEAVES = {"qk_norm": "head", "attention_bias": "all", "classes": CLASSES}
LORA = (("x", AdapterConfig(rank=3)), ("y", AdapterConfig(rank=2, targets=("value", "down"))))
DORA = (("x", AdapterConfig(rank=3, dora=True)),)
ENCODER = {"causal": False, "pool": "mean"}
AROUND = {"positions": "learned", "max_positions": LENGTH, "lm_transform": True, "lm_head_bias": True, "pooler": True}
AROUND |= {"gated_mlp": False, "final_norm": False, "vocab_multiple": 8}


@pytest.mark.parametrize(
    ("rules", "head", "changes"),
    [
        ("all", "lm", {}),
        ("top(1)", "lm", {"tie_embeddings": False, "remat": "full"}),
        pytest.param("layers(1)", "lm", {"remat": "dots"}, marks=pytest.mark.slow),
        pytest.param("embeddings", "lm", {}, marks=pytest.mark.slow),
        ("top(1)", "lm", {"vocab_block": 25, "tie_embeddings": False}),  # 61 tokens in 3 blocks of 25
        pytest.param("lora", "lm", {"vocab_block": 25, "adapters": LORA}, marks=pytest.mark.slow),
        (["layers[1]/attention/value/bias", "head/kernel"], "task", ENCODER),
        (["lora", "head/.*"], "task", {"adapters": LORA}),
        pytest.param("all", "task", {"max_output_positions": 3}, marks=pytest.mark.slow),
        ("top(1)", "task", {"max_output_positions": 3, "remat": "full"}),
        pytest.param("head/.*", "task", {"max_output_positions": 3}, marks=pytest.mark.slow),
        pytest.param("layers(1)", "task", {"max_output_positions": 3, "remat": "dots"}, marks=pytest.mark.slow),
        pytest.param("all", "lm", {"adapters": (*LORA, ("idle", AdapterConfig(active=False)))}, marks=pytest.mark.slow),
        pytest.param(["layers[1]/attention/query/lora/x/b"], "lm", {"adapters": LORA}, marks=pytest.mark.slow),
        pytest.param("lora", "lm", {"adapters": DORA}, marks=pytest.mark.slow),
        pytest.param("lora", "lm", {"adapters": LORA, "remat": "dots"}, marks=pytest.mark.slow),
        pytest.param("all", "lm", {"tie_embeddings": False, "remat": "full"}, marks=pytest.mark.slow),
        pytest.param("embeddings", "lm", {"tie_embeddings": False}, marks=pytest.mark.slow),
        pytest.param("layers[0]/mlp/down/kernel", "lm", {"remat": "dots"}, marks=pytest.mark.slow),
        pytest.param("layers[1]/attention/value/kernel", "lm", {"remat": "full"}, marks=pytest.mark.slow),
        pytest.param("head/bias", "task", {"pool": "mean"}, marks=pytest.mark.slow),
        ("norms", "lm", {"block": "sandwich", "remat": "full"}),
        pytest.param("all", "lm", {"block": "after", "remat": "full"}, marks=pytest.mark.slow),
        ("layers(1)", "lm", {"block": "parallel", "remat": "full"}),
        pytest.param("norms", "lm", {"block": "parallel_one_norm", "remat": "full"}, marks=pytest.mark.slow),
        pytest.param("all", "lm", {"attention_softcap": 3.0, "window": 3, "remat": "dots"}, marks=pytest.mark.slow),
        ("top(1)", "lm", {**AROUND, "vocab_block": 25}),
        pytest.param("lm_transform/dense/bias", "lm", AROUND, marks=pytest.mark.slow),
        ("pooler/bias", "task", {**AROUND, **ENCODER}),
        pytest.param("all", "task", {**AROUND, **ENCODER, "pool": "first"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_formula_counts_the_products_that_the_compiler_kept(rules, head, changes):
    layers = 3 if re.search(r"layers[\[(]1", str(rules)) else 2  # where layer 1 trains, there is one on each side
    config = model_config(**{"layers": layers, "scan_unroll": layers} | ALL_LEAVES | changes)
    step, found = compiled_step(config, rules, head)
    counted = product_flops(step.as_text())
    assert sum(step_flops(config, BATCH, LENGTH, head, found.segments, found.trainable)) == counted
    # the compiler's own figure has the element-wise work as well, which is a small part even at this size
    if "while" not in step.as_text():  # of a loop, it counts one round
        assert counted < step.cost_analysis()["flops"] < 1.5 * counted


@pytest.mark.parametrize("rules", ["all", "top(1)"])
def test_model_flops_do_not_count_what_is_computed_again(rules):
    config = model_config()
    found = make_partition(canonical(abstract(config).shapes), rules, config.layers)
    args = (BATCH, LENGTH, "lm", found.segments, found.trainable)
    once = step_flops(config, *args)
    for again in ({"remat": "full"}, {"remat": "dots"}, {"vocab_block": 25}):
        changed = dataclasses.replace(config, **again)
        assert model_flops(changed, *args) == once and sum(step_flops(changed, *args)) > sum(once)


def test_without_a_partition_everything_trains():
    config = model_config()
    found = make_partition(canonical(abstract(config).shapes), "all", config.layers)
    assert step_flops(config, 2, 12, "lm") == step_flops(config, 2, 12, "lm", found.segments, found.trainable)


def test_a_forward_pass_is_two_flops_a_weight_and_token_and_four_a_pair_of_positions_and_channel():
    config = model_config(tie_embeddings=False, causal=False, pool="mean")
    shapes = canonical(abstract(config).shapes)
    kernels = sum(math.prod(x.shape) for path, x in jax.tree.leaves_with_path(shapes) if "kernel" in str(path))
    pairs = 4 * BATCH * LENGTH**2 * config.layers * config.heads * config.head_dim
    assert forward_flops(config, BATCH, LENGTH, "lm") == 2 * BATCH * LENGTH * kernels + pairs
    forward, backward = step_flops(config, BATCH, LENGTH, "lm")
    assert forward == forward_flops(config, BATCH, LENGTH, "lm") and backward == pytest.approx(2 * forward, rel=1e-12)


def test_a_causal_forward_pass_in_four_blocks_of_queries_skips_three_eighths_of_the_pairs():
    causal, encoder = (
        forward_flops(model_config(causal=each, pool="mean"), BATCH, LENGTH, "lm") for each in (True, False)
    )
    config = model_config()
    pairs = 4 * BATCH * LENGTH**2 * config.layers * config.heads * config.head_dim
    assert encoder - causal == pairs * 3 / 8


def rule_flops(config, rules, head="lm") -> float:
    """The step's FLOPs by the formula."""
    found = make_partition(canonical(abstract(config).shapes), rules, config.layers)
    return sum(step_flops(config, BATCH, LENGTH, head, found.segments, found.trainable))


def test_freezing_the_lower_layers_saves_their_backward_pass():
    config = model_config(layers=8, tie_embeddings=False)
    forward, rules = forward_flops(config, BATCH, LENGTH, "lm"), ("top(1)", "top(2)", "layers[0]/.*", "all")
    costs = [rule_flops(config, each) for each in rules]
    assert forward < costs[0] and costs == sorted(costs)
    assert costs[-1] <= 3 * forward_flops(dataclasses.replace(config, causal=False, pool="mean"), BATCH, LENGTH, "lm")


def test_the_top_layer_is_computed_where_labels_are():
    """By hand: of one layer, all but keys and values is at 3 of 12 places."""
    whole = model_config(layers=1, classes=CLASSES, pool="last")
    less = dataclasses.replace(whole, max_output_positions=3)
    heads, kv = whole.heads * whole.head_dim, whole.kv_heads * whole.head_dim
    d = whole.d_model
    at_places = 2 * d * (2 * heads + 3 * whole.d_ff + CLASSES) + 4 * LENGTH * heads  # a place
    every = 2 * d * 2 * kv  # a token
    expected = {n: BATCH * (n * at_places + LENGTH * every) for n in (3, LENGTH)}
    for config, n in ((less, 3), (whole, LENGTH)):
        forward, backward = step_flops(config, BATCH, LENGTH, "task")
        assert forward == expected[n] and backward == 2 * forward


@pytest.mark.slow
def test_layers_that_are_frozen_above_the_lowest_that_trains_save_their_weight_gradients_and_no_more():
    config = model_config(layers=8, scan_unroll=8, classes=CLASSES)
    top, some = ["layers[4:]/.*", "head/.*"], ["layers(4,5)", "head/.*"]
    heads, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    weights = config.d_model * (2 * heads + 2 * kv + 3 * config.d_ff)  # kernels of a layer
    saved = 2 * 2 * BATCH * LENGTH * weights  # of layers 6 and 7
    assert rule_flops(config, some, "task") < rule_flops(config, "all", "task")
    assert rule_flops(config, top, "task") - rule_flops(config, some, "task") == saved
    counted = [product_flops(compiled_step(config, rules, "task")[0].as_text()) for rules in (top, some)]
    assert counted[0] - counted[1] == saved

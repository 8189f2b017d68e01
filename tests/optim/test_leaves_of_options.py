"""Rules, weight decay, rates by depth and storage treat the leaves of a model's options as what they are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm3.models.transformer import abstract
from llm3.optim.frozen import make_storage
from llm3.optim.learning_rates import rate_factors
from llm3.optim.partition import make_partition
from llm3.segments import canonical
from llm3.tree import flatten
from tests.helpers.tiny import CLASSES, model_config
from tests.helpers.tiny_optim import make

OPTIONS = {"block": "sandwich", "norm": "layernorm", "qk_norm": "projection", "mlp_bias": True, "classes": CLASSES}
OPTIONS |= {"positions": "learned", "max_positions": 16, "token_types": 2, "embedding_norm": True, "pooler": True}
OPTIONS |= {"lm_transform": True, "lm_head_bias": True, "attention_bias": "all"}
PARTS = (
    "attention_norm",
    "attention_out_norm",
    "mlp_norm",
    "mlp_out_norm",
    "attention/query_norm",
    "attention/key_norm",
)
EMBED = {"embed/embedding", "embed/position", "embed/token_type", "embed/norm/scale", "embed/norm/bias"}
ABOVE = {f"{part}/{leaf}" for part in ("lm_transform/dense", "pooler", "head") for leaf in ("kernel", "bias")}
ABOVE |= {f"{part}/{leaf}" for part in ("final_norm", "lm_transform/norm") for leaf in ("scale", "bias")}
ABOVE |= {"lm_head/bias"}
NORMS = {f"{part}/{leaf}" for part in ("embed/norm", "final_norm", "lm_transform/norm") for leaf in ("scale", "bias")}
NORMS |= {f"layers/0:3/{part}/{leaf}" for part in PARTS for leaf in ("scale", "bias")}


@functools.cache
def shapes() -> dict:
    return abstract(model_config(**OPTIONS)).shapes


def trained(rule: str) -> set[str]:
    return set(make_partition(canonical(shapes()), rule, 3).trainable)


def test_shorthands_know_the_leaves_of_options():
    assert trained("norms") == NORMS
    assert trained("embeddings") == EMBED
    assert {path for path in trained("top(1)") if not path.startswith("layers/")} == ABOVE
    every = set(flatten(shapes()))
    assert trained("biases") == {path for path in every if path.endswith("/bias")}
    assert every == {path for path in every if path.startswith("layers/")} | EMBED | ABOVE


def test_weight_decay_is_for_kernels_and_token_embeddings_alone():
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes())
    optimizer = make(params, name="sgd", warmup_steps=0, weight_decay=0.5)
    zeros = jax.tree.map(jnp.zeros_like, params)
    after = optax.apply_updates(params, optimizer.transform.update(zeros, optimizer.transform.init(params), params)[0])
    decayed = {path for path, leaf in flatten(after).items() if np.all(np.asarray(leaf) < 1)}
    assert decayed == {path for path in flatten(shapes()) if path.endswith("/kernel")} | {"embed/embedding"}


def test_rates_by_depth_count_what_is_around_the_layers_with_its_end():
    factors = rate_factors(shapes(), layers=3, layer_decay=0.5, learning_rates=[])
    assert {path for path, factor in factors.items() if factor.size == 1 and factor == 0.5**4} == EMBED
    assert {path for path, factor in factors.items() if factor.size == 1 and factor == 1} == ABOVE


@pytest.mark.parametrize("kind", ["compute", "nf4"])
def test_frozen_leaves_that_the_model_reads_in_float32_are_stored_so(kind):
    sharding = jax.tree.map(lambda _: jax.sharding.NamedSharding(jax.make_mesh((1,), ("x",)), jax.P()), shapes())
    stored = flatten(make_storage(shapes(), sharding, kind, "bfloat16").abstract)
    low = {path for path, leaf in stored.items() if getattr(leaf, "dtype", None) == jnp.bfloat16}
    kernels = {path for path in flatten(shapes()) if path.endswith("/kernel") and path.startswith("layers/")}
    outside = {"embed/embedding", "embed/position", "lm_transform/dense/kernel"}
    assert low == (outside | kernels if kind == "compute" else outside)

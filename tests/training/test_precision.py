"""In a bfloat16 step, sums over tokens are float32; and float32 means float32 on accelerators too."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llm3 import objectives
from llm3.config.schema import AdapterConfig, ModelConfig, OptimizerConfig, StageConfig
from llm3.data.batch import Batch
from llm3.models.lora import with_magnitudes
from llm3.models.transformer import abstract
from llm3.objectives import Task, causal
from llm3.registry import load_plugin, plugin_names
from llm3.segments import segmented
from llm3.training.phase import build
from llm3.tree import flatten, unflatten
from tests.helpers.meshes import mesh_of
from tests.helpers.tiny import make_params, model_config
from tests.helpers.tiny_jaxpr import dtypes_of_axis, inexact_products, low_precision

# sizes that tell axes apart: tokens are counted by TOKENS, and no other axis has such a size
ROWS, LENGTH, MICRO, OUTPUTS, BLOCK = 14, 32, 2, 9, 26
TOKENS = {ROWS, ROWS // MICRO, LENGTH, OUTPUTS}
SHAPE = {"layers": 2, "d_model": 20, "heads": 4, "kv_heads": 2, "head_dim": 6, "d_ff": 28, "vocab_size": 61}
ADAPTER = AdapterConfig(rank=3, alpha=5.0, rslora=True, dora=True, dropout=0.1)
OPTIONS = {
    "plain": {},
    "adapters and biases": {"attention_bias": "all", "qk_norm": "head", "adapters": (("x", ADAPTER),), "remat": "dots"},
    "untied": {"tie_embeddings": False, "norm": "layernorm", "logit_softcap": 9.0, "vocab_block": BLOCK},
    "few outputs": {"max_output_positions": OUTPUTS, "remat": "full"},
    "gemma": {"block": "sandwich", "norm_unit_offset": True, "embedding_scale": 4.0, "attention_softcap": 5.0}
    | {"window": 5, "full_attention_layers": (1,), "mlp_bias": True, "qk_norm": "projection"},
    "bert": {"block": "post", "positions": "learned", "max_positions": LENGTH, "token_types": 2, "pooler": True}
    | {"embedding_norm": True, "lm_transform": True, "lm_head_bias": True, "pool": "first", "causal": False},
}


def traced_step(objective: str, dtype: str, optimizer: str = "adamw", **changes) -> jax.extend.core.Jaxpr:
    """The jaxpr of a step on micro-batches, in which all leaves are trainable."""
    plugin = load_plugin(objectives, objective)
    classes = len(plugin.HEAD) if isinstance(plugin.HEAD, tuple) else 5
    encoder = {"causal": False, "pool": "mean"} if plugin.CAUSAL is False else {}
    config = model_config(**SHAPE | encoder | changes, classes=classes, compute_dtype=dtype)
    fields = {"start": "x", "objective": objective, "micro_batches": MICRO, "optimizer": OptimizerConfig(optimizer)}
    stage = StageConfig("posttrain", {"a": 1.0}, 10, ROWS, LENGTH, **fields)
    task, mesh = Task(None, None, LENGTH), mesh_of(1)
    phase = build(stage, config, mesh, task=task, fresh=lambda path: False, seed=0, where="stage")[0]
    kinds = [np.float32 if name == "weights" else np.int32 for name in Batch._fields]
    batch = Batch(*(jax.ShapeDtypeStruct((ROWS, LENGTH), kind) for kind in kinds))
    return jax.make_jaxpr(phase.train_step)(phase.abstract_state, batch).jaxpr


CASES = [(objective, "plain") for objective in plugin_names(objectives)] + [
    ("causal", "adapters and biases"),
    ("causal", "untied"),
    ("masked", "few outputs"),
    ("classify", "few outputs"),
    ("causal", "gemma"),
    ("masked", "bert"),
    ("classify", "bert"),
]


@pytest.mark.parametrize(("objective", "options"), CASES, ids=map(" ".join, CASES))
def test_every_sum_over_tokens_is_float32_and_every_float32_product_exact(objective, options):
    step = traced_step(objective, "bfloat16", **OPTIONS[options])
    assert low_precision(step, TOKENS) == []
    assert inexact_products(step) == []
    assert dtypes_of_axis(step, SHAPE["vocab_size"]) | dtypes_of_axis(step, BLOCK) <= {"float32"}


def test_every_product_of_a_float32_step_is_exact():
    assert inexact_products(traced_step("causal", "float32", **OPTIONS["adapters and biases"])) == []


def test_muons_products_are_float32_whatever_the_compute_dtype():
    assert inexact_products(traced_step("causal", "bfloat16", "muon")) == []


def zipf_batch(rows: int, length: int, vocab: int) -> Batch:
    """Windows of one document each, of Zipf-distributed tokens."""
    share = 1 / np.arange(1, vocab + 1)
    tokens = np.random.default_rng(0).choice(vocab, (rows, length + 1), p=share / share.sum()).astype(np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    ones = np.ones((rows, length), np.int32)
    return Batch(tokens[:, :-1], positions, ones, tokens[:, 1:], ones.astype(np.float32))


def gradients(config: ModelConfig, params: dict, batch: Batch) -> dict[str, np.ndarray]:
    """The flat gradients of the mean loss."""
    graph = abstract(config).graph

    @jax.jit
    @jax.grad
    def run(params: dict, batch: Batch) -> jax.Array:
        return jnp.mean(causal.token_losses(nnx.merge(graph, segmented(params, ((0, config.layers),))), batch))

    return {path: np.asarray(each, np.float64) for path, each in flatten(jax.device_get(run(params, batch))).items()}


@pytest.mark.slow
def test_the_gradients_of_many_tokens_in_bfloat16_are_near_those_in_float32():
    """32k Zipf-distributed tokens. Prints the relative errors of all leaves, for docs/results.md."""
    model = {"vocab_size": 512, "layers": 2, "d_model": 32, "heads": 2, "head_dim": 16, "d_ff": 64}
    adapters = (("x", AdapterConfig(rank=4, dora=True)),)
    config = model_config(**model, attention_bias="all", tie_embeddings=False, adapters=adapters)
    flat = flatten(make_params(config))
    flat = {path: leaf * (0.1 if path.endswith(("/a", "/b")) else 1) for path, leaf in flat.items()}
    params = with_magnitudes(unflatten(flat), flat)
    batch = zipf_batch(128, 256, 512)
    exact, found = (
        gradients(dataclasses.replace(config, compute_dtype=dtype), params, batch) for dtype in ("float32", "bfloat16")
    )
    errors = {path: np.linalg.norm(found[path] - exact[path]) / np.linalg.norm(exact[path]) for path in exact}
    for path, error in errors.items():
        print(f"{path:<50}{error:.4f}")
    assert max(errors.values()) < 0.02

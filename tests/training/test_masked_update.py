"""The clipped update of random rules, over every kind of leaf, under every remat and on one and eight devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llm3.config.schema import AdapterConfig, StageConfig
from llm3.distributed.sharding import place_batch
from llm3.errors import UserError
from llm3.models.transformer import abstract
from llm3.objectives import causal
from llm3.optim.partition import Partition, make_partition
from llm3.segments import segmented
from llm3.training.phase import build
from llm3.tree import flatten
from tests.helpers.meshes import mesh_of
from tests.helpers.tiny import COMPILE_FAST, TASK, jit, make_batch, make_params, model_config
from tests.training.test_step import OPTIMIZERS, ROWS, STEPS, Run

ADAPTERS = (
    ("x", AdapterConfig(rank=2, alpha=0.5, targets=("query", "down"))),
    ("y", AdapterConfig(rank=2, alpha=0.5, dora=True, targets=("up",))),
)
MODEL = model_config(
    vocab_size=64, attention_bias="all", qk_norm="head", norm="layernorm", tie_embeddings=False, adapters=ADAPTERS
)
PARAMS = make_params(MODEL)


@functools.cache
def full_gradients() -> dict[str, np.ndarray]:
    """Flat canonical gradients of all leaves, without a partition, a train step or remat."""
    graph = abstract(MODEL).graph

    def mean_loss(params, batch):
        model = nnx.merge(graph, segmented(params, ((0, MODEL.layers),)))
        return jnp.sum(causal.token_losses(model, batch) * batch.weights) / jnp.sum(batch.weights)

    return flatten(jax.device_get(jit(jax.grad(mean_loss))(PARAMS, make_batch(ROWS))))


def one_step(rules: list[str], remat: str, devices: int) -> tuple[dict, dict, Partition]:
    """Canonical parameters after a step of clipped and decayed SGD, and the metrics."""
    fields = {"start": "pretrain", "train": rules, "optimizer": OPTIMIZERS["clipped"]}
    stage = StageConfig("posttrain", {"source": 1.0}, STEPS, ROWS, 16, **fields)
    mesh = mesh_of(1) if devices == 1 else mesh_of(8, data=2, fsdp=2, tensor=2)
    config = model_config(**{**vars(MODEL), "remat": remat})
    with jax.set_mesh(mesh):
        phase = build(stage, config, mesh, task=TASK, fresh=lambda path: False, seed=0, where="stage")[0]
        lowered = phase.train_step.lower(phase.abstract_state, place_batch(mesh, make_batch(ROWS)))
        run = Run(config, phase, mesh, lowered.compile(compiler_options=COMPILE_FAST))
    state, metrics = run.step(run.state(PARAMS), make_batch(ROWS))
    return run.canonical(state), metrics, phase.partition


def mask_of(found: Partition) -> dict[str, np.ndarray]:
    masks = {path: np.zeros(np.shape(leaf), bool) for path, leaf in flatten(PARAMS).items()}
    for path in found.trainable:
        head, _, rest = path.partition("/")
        if head == "layers":
            cut, _, name = rest.partition("/")
            first, last = map(int, cut.split(":"))
            masks[f"layers/{name}"][first:last] = True
        else:
            masks[path][...] = True
    return masks


def assert_update_is_the_masked_gradient(rules: list[str], remat: str, devices: int) -> None:
    after, metrics, found = one_step(rules, remat, devices)
    before, masks, options = flatten(PARAMS), mask_of(found), OPTIMIZERS["clipped"]
    masked = {path: gradient * masks[path] for path, gradient in full_gradients().items()}
    norm = np.sqrt(sum(np.sum(np.square(each, dtype=np.float64)) for each in masked.values()))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    clip = min(1.0, options.clip_norm / norm)
    for path in before:
        decay = options.weight_decay * before[path] * path.endswith(("/kernel", "/embedding", "/a", "/b"))
        change = options.learning_rate * (clip * masked[path] + decay * masks[path])
        np.testing.assert_allclose(after[path], before[path] - change, atol=1e-6, rtol=1e-6, err_msg=path)
        np.testing.assert_array_equal(after[path][~masks[path]], before[path][~masks[path]], err_msg=path)


LAYERS = ["layers[0]", "layers[1]", "layers[-1]", "layers[1:]", "layers[0,2]", "layers"]
PARTS = [".*", "mlp/.*", "attention/.*", "attention/value/kernel", ".*/bias", ".*/(scale|bias)", ".*/lora/.*"]
RULES = [
    "all",
    "top(1)",
    "top(2)",
    "layers(0,2)",
    "biases",
    "norms",
    "embeddings",
    "lora",
    "lora(y)",
    "lm_head/.*",
]
rule = st.one_of(st.sampled_from(RULES), st.builds("{}/{}".format, st.sampled_from(LAYERS), st.sampled_from(PARTS)))
rule_lists = st.lists(st.builds("{}{}".format, st.sampled_from(["", "", "not "]), rule), min_size=1, max_size=3)


@pytest.mark.slow
@pytest.mark.parametrize(("remat", "devices"), [("none", 1), ("full", 8), ("dots", 8)])
@settings(max_examples=2, deadline=None)
@given(rules=rule_lists)
def test_an_update_equals_the_masked_one_for_any_rule_any_remat_and_any_devices(remat, devices, rules):
    try:
        make_partition(PARAMS, rules, MODEL.layers)
    except UserError:
        assume(False)
    assert_update_is_the_masked_gradient(rules, remat, devices)

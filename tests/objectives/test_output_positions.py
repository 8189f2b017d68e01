"""Classification at the last token: the last layer is computed only where labels stand, and nothing changes by it."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx

from llm3.config.schema import AdapterConfig
from llm3.data.batch import Batch
from llm3.distributed.sharding import make_mesh, place_batch
from llm3.models.transformer import abstract, abstract_params
from llm3.objectives import classify
from llm3.segments import canonical, segmented
from llm3.tree import flatten
from tests.helpers.tiny import CLASSES, TASK, jit, make_batch, make_params, model_config

ROWS, MOST = 4, 3


def labelled() -> Batch:
    """One to three labels a row, at ends of documents and elsewhere; the rest of `targets` is of no consequence."""
    batch, rng = make_batch(ROWS), np.random.default_rng(1)
    weights = np.zeros(batch.tokens.shape, np.float32)
    for row, count in enumerate((1, 3, 2, 3)):
        weights[row, rng.choice(np.flatnonzero(batch.segments[row]), count, replace=False)] = 1
    return batch._replace(targets=rng.integers(0, CLASSES, batch.tokens.shape).astype(np.int32), weights=weights)


def small_params(config):
    """Half of the usual values: sharper attention would show how quick compilation rounds."""
    return jax.tree.map(lambda leaf: leaf / 2, make_params(config))


def gradients(config, segments):
    graph, params = abstract(config, segments).graph, small_params(config)

    @jit
    @jax.value_and_grad
    def loss(params):
        return classify.loss(nnx.merge(graph, segmented(params, segments)), labelled(), jax.random.key(0), TASK).loss

    value, gradient = loss(params)
    return float(value), flatten(canonical(segmented(gradient, segments)))


REMAT = {"remat": "full", "qk_norm": "head", "attention_bias": "all"}


@pytest.mark.parametrize(
    ("segments", "changes"),
    [
        (((0, 3),), {}),
        pytest.param(((0, 2), (2, 3)), REMAT, marks=pytest.mark.slow, id="remat"),
        (((0, 1), (1, 3)), {}),
    ],
    ids=str,
)
def test_loss_and_gradients_are_those_of_all_positions(segments, changes):
    adapters = (("x", AdapterConfig(rank=2)),)
    config = model_config(classes=CLASSES, adapters=adapters, **changes)
    value, expected = gradients(config, segments)
    found, gradient = gradients(dataclasses.replace(config, max_output_positions=MOST), segments)
    assert found == pytest.approx(value, rel=1e-6)
    for path, leaf in expected.items():
        np.testing.assert_allclose(gradient[path], leaf, atol=5e-5 * max(1, np.abs(leaf).max()), err_msg=path)
    assert np.abs(expected["layers/mlp/down/kernel"][-1]).max() > 1e-4


def test_it_is_the_same_on_eight_devices():
    config = model_config(classes=CLASSES, vocab_size=64, max_output_positions=MOST)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, jax.devices()[:8])
    graph, segments = abstract(config).graph, ((0, config.layers),)

    def loss(params, batch):
        model = nnx.merge(graph, segmented(params, segments))
        return classify.loss(model, batch, jax.random.key(0), TASK).loss

    params = small_params(config)
    expected, gradient = jit(jax.value_and_grad(loss))(params, labelled())
    with jax.set_mesh(mesh):
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(config, mesh))
        sharded = jax.device_put(params, shardings)
        found, on_eight = jit(jax.value_and_grad(loss))(sharded, place_batch(mesh, labelled()))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for path, leaf in flatten(gradient).items():
        np.testing.assert_allclose(flatten(on_eight)[path], leaf, atol=1e-4, err_msg=path)


def test_the_sums_and_metrics_are_the_same():
    def sums(graph, params):
        return classify.loss(nnx.merge(graph, params), labelled(), jax.random.key(0), TASK)

    config = model_config(classes=CLASSES)
    params = segmented(small_params(config), ((0, config.layers),))

    results = []
    for max_output_positions in (0, MOST, 10):
        graph = abstract(dataclasses.replace(config, max_output_positions=max_output_positions)).graph
        results.append(jit(functools.partial(sums, graph))(params))
    assert results[0].weight == 9
    for each in results[1:]:
        assert each.weight == results[0].weight and each.metrics["accuracy"] == results[0].metrics["accuracy"]
        np.testing.assert_allclose(each.loss, results[0].loss, rtol=1e-6)

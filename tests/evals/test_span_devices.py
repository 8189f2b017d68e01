"""Spans are found alike on one device and on eight."""

import functools

import jax

from llm3.distributed.sharding import place_batch, tree_shardings
from llm3.evals import span
from llm3.models.transformer import abstract
from llm3.segments import segmented
from tests.evals.test_span_evals import ROWS, cache_of
from tests.helpers.tiny import make_params, model_config
from tests.helpers.tiny_cache import BYTES, make_context


def test_predictions_are_the_same_on_eight_devices(eight_devices):
    model = {"classes": 2, "causal": False, "pool": "mean"}
    config = model_config(vocab_size=BYTES.vocab_size, **model)
    expected = span.predictions(make_context(span, cache_of(*ROWS), length=100, **model))
    whole, cut = abstract(config), segmented(make_params(config), ((0, config.layers),))
    with jax.set_mesh(eight_devices):
        placed = jax.tree.map(jax.device_put, cut, tree_shardings(eight_devices, whole.shapes, whole.axes))
        place = functools.partial(place_batch, eight_devices)
        test = make_context(span, cache_of(*ROWS), length=100, batch_size=8, params=placed, place=place, **model)
        assert span.predictions(test) == expected
    assert len(set(expected)) > 2

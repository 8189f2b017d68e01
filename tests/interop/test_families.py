"""Models of each family compute in llm3 what they compute in transformers, and are written as they were read."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llm3.interop.folder import open_folder
from llm3.models.incremental import read
from llm3.models.kv_cache import make_cache
from llm3.models.transformer import abstract
from llm3.segments import segmented
from tests.helpers.tiny import jit
from tests.helpers.tiny_hf import FAMILIES, VOCAB, logits, saved, tiny
from tests.helpers.tiny_world import float32_model, packed_logits, read_params

DECODERS = [name for name in FAMILIES if "bert" not in name]


def documents() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return random.integers(3, VOCAB, 24), random.integers(3, VOCAB, 11)


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_and_padded_documents_have_the_logits_of_transformers(name, tmp_path):
    folder = open_folder(str(saved(name, tmp_path)), None, "model")
    assert folder.ignored == ()
    found = packed_logits(float32_model(folder), read_params(folder), *documents(), length=40)
    for each, document in zip(found, documents(), strict=True):
        expected = logits(tiny(name), document)
        assert np.abs(expected).max() > 1
        np.testing.assert_allclose(each, expected, atol=1e-4)


@pytest.mark.parametrize("name", DECODERS)
def test_decoding_with_a_cache_gives_the_logits_of_transformers(name, tmp_path):
    folder = open_folder(str(saved(name, tmp_path)), None, "model")
    model, text, given = float32_model(folder), documents()[0], 20
    expected = logits(tiny(name), text)

    @functools.partial(jit, static_argnames="first")
    def step(params, tokens, cache, first):
        built = nnx.merge(abstract(model).graph, params)
        hidden, cache = read(built, tokens, jnp.full(1, tokens.shape[1]), cache, first=first)
        return built.logits(hidden[:, -1:])[0, -1], cache

    whole = ((0, model.layers),)
    params, cache = segmented(read_params(folder), whole), make_cache(model, whole, 1, len(text))
    for start, stop in [(0, given), *((at, at + 1) for at in range(given, len(text)))]:
        tokens = jnp.asarray(text[None, start:stop], jnp.int32)
        found, cache = step(params, tokens, cache, start == 0)
        np.testing.assert_allclose(jax.device_get(found), expected[stop - 1], atol=1e-4)

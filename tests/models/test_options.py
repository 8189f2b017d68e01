"""Models with the options of other families, against a numpy float64 forward pass and against themselves.

Each of FAMILIES has the options of a known family, so that together they have every option, in every block form.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llm3.config.model_schema import ModelConfig, RopeScaling
from llm3.distributed.sharding import place_batch, tree_shardings
from llm3.models.attention.pattern import Pattern, Places
from llm3.models.incremental import read
from llm3.models.kv_cache import make_cache
from llm3.models.transformer import abstract
from llm3.segments import canonical, segmented
from llm3.tree import flatten, unflatten
from tests.helpers import reference
from tests.helpers.meshes import mesh_of
from tests.helpers.tiny import (
    CLASSES,
    VOCAB,
    jit,
    make_batch,
    make_documents,
    make_params,
    make_row,
    model_config,
    stack,
)

LLAMA3 = RopeScaling("llama3", factor=3.0, low_freq_factor=0.5, high_freq_factor=2.0, original_max_positions=30)
FAMILIES = {
    "gemma": {"block": "sandwich", "norm_unit_offset": True, "embedding_scale": 4.0, "activation": "gelu_tanh"}
    | {"attention_scale": 0.6, "attention_softcap": 1.5, "logit_softcap": 1.5, "qk_norm": "head", "window": 3}
    | {"full_attention_layers": (1,), "window_rope_theta": 20.0, "rope_theta": 100.0}
    | {"rope_scaling": RopeScaling("linear", 4.0)},
    "olmo2": {"block": "after", "qk_norm": "projection", "rope_scaling": LLAMA3, "rope_theta": 100.0},
    "neox": {"block": "parallel", "norm": "layernorm", "activation": "gelu", "gated_mlp": False, "mlp_bias": True}
    | {"attention_bias": "all", "rope_fraction": 2 / 3, "tie_embeddings": False, "vocab_multiple": 8},
    "phi": {"block": "parallel_one_norm", "norm": "layernorm", "rope_fraction": 2 / 3, "rope_interleaved": True}
    | {"attention_bias": "qkv", "lm_head_bias": True, "tie_embeddings": False, "no_rope_layers": (1,)},
    "gpt2": {"positions": "learned", "max_positions": 16, "norm": "layernorm_no_bias", "gated_mlp": False}
    | {"lm_head_bias": True, "vocab_multiple": 4, "skip_first_norm": True},
    "bert": {"causal": False, "block": "post", "positions": "learned", "max_positions": 16, "position_offset": 2}
    | {"token_types": 2, "embedding_norm": True, "final_norm": False, "lm_transform": True, "lm_head_bias": True}
    | {"norm": "layernorm", "activation": "gelu", "gated_mlp": False, "pool": "first", "pooler": True},
    "modernbert": {"causal": False, "norm": "layernorm_no_bias", "skip_first_norm": True, "embedding_norm": True}
    | {"window": 4, "full_attention_layers": (0, 2), "window_rope_theta": 20.0, "activation": "gelu"}
    | {"lm_transform": True, "lm_transform_bias": False, "pool": "mean", "pooler": True},
    "mistral": {"window": 3, "full_attention_layers": (), "attention": "blockwise"},
}
CAUSAL = [name for name, options in FAMILIES.items() if options.get("causal", True)]
TOLERANCE = 1e-4
DEFAULTS = {field.name: field.default for field in dataclasses.fields(ModelConfig)}


@functools.cache
def family(name: str):
    """(config, params, batch -> logits without padding, class logits) of a compiled model."""
    config = model_config(classes=CLASSES, **FAMILIES[name])
    graph = abstract(config).graph

    @jit
    def apply(params, batch):
        model = nnx.merge(graph, params)
        hidden = model(batch.tokens, batch.positions, batch.segments)
        return model.logits(hidden)[..., :VOCAB], model.class_logits(hidden, batch.segments)

    params = make_params(config)
    return config, params, lambda batch: jax.device_get(apply(segmented(params, ((0, config.layers),)), batch))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_option_agrees_with_an_independent_forward_pass(name):
    config, params, apply = family(name)
    batch = make_batch(3)
    logits, classes = apply(batch)
    expected = reference.logits(config, params, batch), reference.class_logits(config, params, batch)
    np.testing.assert_allclose(logits, expected[0], atol=TOLERANCE)
    np.testing.assert_allclose(classes, expected[1], atol=TOLERANCE)


# options whose leaves the default lacks or reads as well: `test_an_option_adds_its_leaves_and_no_others` has these
LEAVES = {"gated_mlp", "tie_embeddings", "vocab_multiple", "block", "norm", "positions", "final_norm", "max_positions"}
LEAVES |= {"attention_bias", "mlp_bias", "lm_transform_bias"}
LEAVES |= {"attention"}  # which changes nothing
OTHERS = {"position_offset": 1, "window": {3: 5, 4: 6}, "activation": {"gelu": "gelu_tanh", "gelu_tanh": "gelu"}}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_comparison_would_see_that_an_option_is_ignored(name):
    config, params, _ = family(name)
    batch = stack(make_row(*make_documents(2, least=7)))
    whole = reference.logits(config, params, batch), reference.class_logits(config, params, batch)
    for option, value in FAMILIES[name].items():
        if option in LEAVES or value == DEFAULTS[option]:
            continue
        other = OTHERS.get(option, DEFAULTS[option])
        change = {option: other[value] if isinstance(other, dict) else other}
        if option in ("causal", "pool"):
            change["pool"] = "mean" if value != "mean" else "first"
        ignoring = dataclasses.replace(config, **change)
        changed = reference.logits(ignoring, params, batch), reference.class_logits(ignoring, params, batch)
        assert max(np.abs(a - b).max() for a, b in zip(whole, changed, strict=True)) > 5 * TOLERANCE, option


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_documents_read_as_if_alone(name):
    apply, documents = family(name)[2], make_documents(2, least=7)
    outputs = apply(stack(make_row(*documents), make_row(), make_row()))
    alone = [apply(stack(make_row(document), make_row(), make_row())) for document in documents]
    for together, *apart in zip(outputs, *alone, strict=True):
        cut = np.concatenate([each[0, : len(document)] for each, document in zip(apart, documents, strict=True)])
        np.testing.assert_allclose(together[0, : len(cut)], cut, atol=2e-5)


@pytest.mark.parametrize("name", CAUSAL)
def test_reading_in_pieces_with_a_cache_gives_the_logits_of_the_whole_text(name):
    config, params, _ = family(name)
    cut, tokens, lengths = ((0, 1), (1, 3)), np.stack(make_documents(2, least=12, most=12)).astype(np.int32), (12, 11)
    graph, expected = abstract(config, cut).graph, reference.logits(config, params, stack(*map(make_row, tokens)))

    @functools.partial(jit, static_argnames="first")
    def read_on(params, tokens, counts, cache, first):
        model = nnx.merge(graph, params)
        hidden, cache = read(model, tokens, counts, cache, first=first)
        return model.logits(hidden), cache

    cache, done = make_cache(config, cut, 2, 12, chunk=3), np.zeros(2, np.int32)
    for counts in ((7, 5), (3, 1), (0, 3), (1, 2), (1, 0)):
        width = 3 if done.any() else 8  # more than the rings of windows have room for
        piece = np.full((2, width), VOCAB - 1, np.int32)
        for row, count in enumerate(counts):
            piece[row, :count] = tokens[row, done[row] : done[row] + count]
        logits, cache = read_on(segmented(params, cut), piece, np.array(counts), cache, not done.any())
        for row, (start, count) in enumerate(zip(done, counts, strict=True)):
            found, right = logits[row, :count, :VOCAB], expected[row, start : start + count]
            np.testing.assert_allclose(found, right, atol=TOLERANCE)
        done += counts
    assert tuple(done) == lengths == tuple(cache.lengths.tolist())
    slots = {values.shape[3] for pairs in cache.buffers.values() for _, values in pairs}
    rings = {config.window - 1 + 3} if config.window else set()
    assert slots == rings | ({12} if len(config.full_attention_layers) or not config.window else set())


slow = lambda *names: [pytest.param(name, marks=pytest.mark.slow) for name in names]  # noqa: E731
DEVICES = {"fsdp": 2, "context": 2, "tensor": 2}


@functools.cache
def loss_and_gradients(name: str, cut=((0, 3),), sizes=(), **changes):
    """Of both heads, with a vocabulary padded from 61 to 64; gradients canonical and flat."""
    config = model_config(classes=CLASSES, **FAMILIES[name] | {"vocab_multiple": 4} | changes)
    model, mesh = abstract(config, cut), mesh_of(8 if sizes else 1, **dict(sizes))

    @jax.value_and_grad
    def gradient(params, batch):
        model = nnx.merge(abstract(config, cut).graph, params)
        hidden = model(batch.tokens, batch.positions, batch.segments)
        nats, _ = model.score(hidden, batch.targets)
        logits = model.class_logits(hidden, batch.segments)
        return (nats * batch.weights).mean() + (jnp.square(logits) * batch.weights[..., None]).mean()

    with jax.set_mesh(mesh):
        params = segmented(make_params(config), cut)
        arguments = (
            jax.device_put(params, tree_shardings(mesh, model.shapes, model.axes)),
            place_batch(mesh, make_batch(4)),
        )
        loss, gradients = jit(gradient)(*arguments)
        return float(loss), flatten(jax.device_get(canonical(gradients)))


def assert_same(found, expected):
    (loss, gradients), (expected_loss, plain) = found, expected
    assert loss == pytest.approx(expected_loss, rel=1e-5) and gradients.keys() == plain.keys()
    for path, gradient in plain.items():
        largest = np.abs(gradient).max()
        assert largest > 1e-6, path
        np.testing.assert_allclose(gradients[path], gradient, atol=1e-4 * largest, err_msg=path)


@pytest.mark.parametrize("name", ["gemma", *slow("bert", "olmo2", "modernbert")])
def test_remat_unrolling_segments_and_blocks_change_neither_loss_nor_gradients(name):
    changes = {"remat": "full", "scan_unroll": 2, "vocab_block": 25, "attention": "blockwise"}
    assert_same(loss_and_gradients(name, ((0, 1), (1, 3)), **changes), loss_and_gradients(name))


@pytest.mark.parametrize("name", ["gemma", *slow("bert", "olmo2", "mistral", "modernbert")])
def test_eight_devices_compute_the_gradients_of_one(name):
    assert_same(loss_and_gradients(name, sizes=tuple(DEVICES.items())), loss_and_gradients(name))


@pytest.mark.parametrize("name", ["neox", "gpt2"])
def test_tokens_that_only_fill_the_vocabulary_are_never_chosen_and_have_no_loss(name):
    config, params, _ = family(name)
    graph, batch = abstract(config).graph, make_batch(3)

    @jit
    def score(params):
        model = nnx.merge(graph, segmented(params, ((0, 3),)))
        hidden = model(batch.tokens, batch.positions, batch.segments)
        return model.logits(hidden), model.score(hidden, batch.targets)[0]

    filled = {"embed/embedding": 0, "lm_head/kernel": 1, "lm_head/bias": 0}
    loud = flatten(params)
    for path in filled.keys() & loud.keys():
        real, fill = np.split(loud[path], [VOCAB], filled[path])
        loud[path] = np.concatenate([real, 9 + fill], filled[path])
    logits, nats = score(unflatten(loud))
    assert logits.shape[-1] > VOCAB and logits.argmax(-1).max() < VOCAB
    np.testing.assert_allclose(nats, reference.nats(reference.logits(config, params, batch), batch.targets), atol=2e-4)


@pytest.mark.parametrize("name", ["gemma", "phi", "bert"])
def test_the_last_layer_at_some_positions_is_that_of_the_whole_window(name):
    config, params, _ = family(name)
    graph, batch = abstract(config).graph, make_batch(3)
    chosen = np.array([[0, 5, 9], [2, 1, 3], [7, 4, 0]], np.int32)

    @jit
    def read(params):
        model = nnx.merge(graph, segmented(params, ((0, 3),)))
        inputs = batch.tokens, batch.positions, batch.segments
        return model(*inputs), model(*inputs, output_positions=chosen)

    whole, some = read(params)
    np.testing.assert_allclose(some, np.take_along_axis(np.asarray(whole), chosen[..., None], 1), atol=2e-5)


@pytest.mark.parametrize("window", [0, 1, 4, 5])
@pytest.mark.parametrize("causal", [True, False])
def test_a_window_counts_the_query_itself_and_reaches_as_far_ahead_for_a_prefix(causal, window):
    row = make_row(*make_documents(2, least=7))
    prefix = (row.positions < 5) & (row.segments > 0)
    each = Places(row.positions[None], row.segments[None])
    found = Pattern(each, each, prefix[None] if causal else None, causal, window, in_order=True).mask()[0]
    for q, k in np.ndindex(found.shape):
        distance = abs(int(row.positions[q]) - int(row.positions[k]))
        seen = row.segments[q] == row.segments[k] and (not causal or k <= q or prefix[k])
        near = not window or (distance < window if causal else 2 * distance <= window)
        assert found[q, k] == (seen and near), (q, k)

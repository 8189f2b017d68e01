"""The transformer against a numpy float64 one, and against itself however it is cut, packed, cached or placed."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from llm3.models.transformer import abstract, init
from llm3.objectives.causal import token_losses
from llm3.segments import canonical, segmented
from llm3.tree import flatten, leaf_digests
from tests.helpers import reference
from tests.helpers.meshes import mesh_of
from tests.helpers.tiny import (
    CLASSES,
    LENGTH,
    VOCAB,
    jit,
    make_batch,
    make_documents,
    make_params,
    make_row,
    model_config,
    stack,
)

LM_TRANSFORM = {"lm_transform/dense/kernel": (16, 16), "lm_transform/norm/scale": (16,)}
BIDIRECTIONAL = {"causal": False, "pool": "mean", "classes": CLASSES}
OPTIONS = {
    "nothing": {},
    "qk_norm": {"qk_norm": "head"},
    "attention_bias": {"attention_bias": "all"},
    "layernorm": {"norm": "layernorm"},
    "untied": {"tie_embeddings": False},
    "softcap": {"logit_softcap": 1.5},
    "all heads their own keys": {"kv_heads": 4},
    "rope_theta": {"rope_theta": 100.0},
    "bidirectional": {"causal": False, "pool": "mean"},
    "all": {"qk_norm": "head", "attention_bias": "all", "norm": "layernorm", "tie_embeddings": False}
    | {"logit_softcap": 1.5, "kv_heads": 1, "causal": False, "pool": "mean"},
}


@functools.cache
def forward(**changes):
    """(config, params, batch -> logits, class logits) of a compiled model."""
    config = model_config(classes=CLASSES, **changes)
    graph = abstract(config).graph

    @jit
    def apply(params, batch):
        model = nnx.merge(graph, params)
        hidden = model(batch.tokens, batch.positions, batch.segments)
        return model.logits(hidden), model.class_logits(hidden, batch.segments)

    params = make_params(config)
    return config, params, lambda batch: jax.device_get(apply(segmented(params, ((0, config.layers),)), batch))


def both_kinds(test):
    kinds = [{}, {"causal": False, "pool": "mean"}]
    return pytest.mark.parametrize("changes", kinds, ids=["causal", "bidirectional"])(test)


@pytest.mark.parametrize("option", OPTIONS)
def test_model_agrees_with_an_independent_forward_pass(option):
    config, params, apply = forward(**OPTIONS[option])
    batch = make_batch(3)
    logits, classes = apply(batch)
    np.testing.assert_allclose(logits, reference.logits(config, params, batch), atol=1e-4)
    np.testing.assert_allclose(classes, reference.class_logits(config, params, batch), atol=1e-4)
    if option != "nothing":
        plain, _ = forward()[2](batch)
        assert np.abs(logits - plain).max() > 0.01


@pytest.mark.parametrize(
    ("changes", "leaves"),
    [
        ({"qk_norm": "head"}, {"attention/query_norm/scale": (3, 6), "attention/key_norm/scale": (3, 6)}),
        (
            {"attention_bias": "all"},
            {"attention/query/bias": (3, 4, 6), "attention/key/bias": (3, 2, 6)}
            | {"attention/value/bias": (3, 2, 6), "attention/out/bias": (3, 16)},
        ),
        ({"norm": "layernorm"}, {"attention_norm/bias": (3, 16), "mlp_norm/bias": (3, 16), "final_norm/bias": (16,)}),
        ({"tie_embeddings": False}, {"lm_head/kernel": (16, VOCAB)}),
        ({"classes": 7}, {"head/kernel": (16, 7), "head/bias": (7,)}),
        ({"logit_softcap": 9.0}, {}),
        (
            {"attention_bias": "qkv"},
            {"attention/query/bias": (3, 4, 6), "attention/key/bias": (3, 2, 6), "attention/value/bias": (3, 2, 6)},
        ),
        ({"mlp_bias": True}, {"mlp/gate/bias": (3, 28), "mlp/up/bias": (3, 28), "mlp/down/bias": (3, 16)}),
        ({"qk_norm": "projection"}, {"attention/query_norm/scale": (3, 4, 6), "attention/key_norm/scale": (3, 2, 6)}),
        ({"block": "sandwich"}, {"attention_out_norm/scale": (3, 16), "mlp_out_norm/scale": (3, 16)}),
        *(({"block": block}, {}) for block in ("after", "post", "parallel")),
        ({"norm": "layernorm_no_bias", "skip_first_norm": True, "window": 3}, {}),
        ({"lm_head_bias": True, "vocab_multiple": 1}, {"lm_head/bias": (VOCAB,)}),
        ({"tie_embeddings": False, "lm_head_bias": True}, {"lm_head/kernel": (16, VOCAB), "lm_head/bias": (VOCAB,)}),
        (
            {
                "positions": "learned",
                "max_positions": 9,
                "position_offset": 2,
                "token_types": 3,
                "embedding_norm": True,
            },
            {"embed/position": (11, 16), "embed/token_type": (3, 16), "embed/norm/scale": (16,)},
        ),
        ({"lm_transform": True, "lm_transform_bias": False}, LM_TRANSFORM),
        ({"lm_transform": True}, LM_TRANSFORM | {"lm_transform/dense/bias": (16,)}),
        (
            {"classes": 7, "pooler": True},
            {"head/kernel": (16, 7), "head/bias": (7,), "pooler/kernel": (16, 16), "pooler/bias": (16,)},
        ),
        ({"pooler": True}, {}),
    ],
)
def test_an_option_adds_its_leaves_and_no_others(changes, leaves):
    def shapes(config):
        return {path: leaf.shape for path, leaf in flatten(canonical(abstract(config).shapes)).items()}

    plain, changed = shapes(model_config()), shapes(model_config(**changes))
    added = {path.removeprefix("layers/"): shape for path, shape in changed.items() if path not in plain}
    assert added == leaves
    assert plain.items() <= changed.items()


def test_an_option_can_take_leaves_away_and_pad_the_vocabulary():
    def shapes(config):
        return {path: leaf.shape for path, leaf in flatten(canonical(abstract(config).shapes)).items()}

    plain = shapes(model_config())
    for changes, gone in (
        ({"gated_mlp": False}, "layers/mlp/gate/kernel"),
        ({"block": "parallel_one_norm"}, "layers/mlp_norm/scale"),
        ({"final_norm": False}, "final_norm/scale"),
    ):
        assert shapes(model_config(**changes)) == {path: shape for path, shape in plain.items() if path != gone}
    padded = shapes(model_config(vocab_multiple=8, tie_embeddings=False, lm_head_bias=True))
    assert padded["embed/embedding"] == (64, 16) and padded["lm_head/kernel"] == (16, 64)
    assert padded["lm_head/bias"] == (64,)


def test_causal_logits_do_not_depend_on_later_tokens():
    document = make_documents(1, least=LENGTH, most=LENGTH)[0]
    later = document.copy()
    later[9:] = (later[9:] + 1) % VOCAB
    apply = forward()[2]
    logits, other = apply(stack(make_row(document)))[0], apply(stack(make_row(later)))[0]
    np.testing.assert_array_equal(logits[:, :9], other[:, :9])
    assert np.all(np.abs(logits[:, 9:] - other[:, 9:]).max(axis=-1) > 0.01)


def test_bidirectional_logits_depend_on_later_tokens():
    document = make_documents(1, least=LENGTH, most=LENGTH)[0]
    later = document.copy()
    later[9:] = (later[9:] + 1) % VOCAB
    apply = forward(causal=False, pool="mean")[2]
    logits, other = apply(stack(make_row(document)))[0], apply(stack(make_row(later)))[0]
    assert np.all(np.abs(logits - other).max(axis=-1) > 0.001)


@both_kinds
def test_packed_documents_read_as_if_alone(changes):
    apply, documents = forward(**changes)[2], make_documents(4)
    packed = stack(make_row(*documents[:2]), make_row(*documents[2:]), make_row(*documents[1:3]))
    outputs = apply(packed)
    for row, pair in enumerate((documents[:2], documents[2:], documents[1:3])):
        start = 0
        for document in pair:
            alone = apply(stack(make_row(document), make_row(), make_row()))
            for together, apart in zip(outputs, alone, strict=True):
                place = slice(start, start + len(document))
                np.testing.assert_allclose(together[row, place], apart[0, : len(document)], atol=1e-5)
            start += len(document)


@both_kinds
def test_changing_one_document_changes_no_logit_of_its_neighbour(changes):
    apply, (first, second, third) = forward(**changes)[2], make_documents(3, most=5)
    changed = (first + 1) % VOCAB
    before = apply(stack(*[make_row(first, second, third)] * 3))
    after = apply(stack(*[make_row(changed, second, third)] * 3))
    rest = slice(len(first), LENGTH)
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old[:, rest], new[:, rest])
        assert np.abs(old - new).max() > 0.01


@functools.cache
def loss_and_gradients(**changes):
    """Of the mean next-token loss; gradients canonical and flat."""
    config = model_config(qk_norm="head", **changes)
    segments = ((0, config.layers),)
    graph = abstract(config, segments).graph

    @jit
    def gradient(params, batch):
        return jax.value_and_grad(lambda p: (token_losses(nnx.merge(graph, p), batch) * batch.weights).mean())(params)

    loss, gradients = gradient(segmented(make_params(config), segments), make_batch(4))
    return float(loss), flatten(canonical(gradients))


@pytest.mark.parametrize(
    "changes",
    [{"remat": "dots", "scan_unroll": 3}, pytest.param({"remat": "dots"}, marks=pytest.mark.slow)],
    ids=str,
)
def test_remat_of_all_but_matmuls_changes_neither_loss_nor_gradients(changes):
    loss, gradients = loss_and_gradients()
    other_loss, other = loss_and_gradients(**changes)
    assert other_loss == pytest.approx(loss, abs=1e-6)
    assert other.keys() == gradients.keys()
    for path, gradient in gradients.items():
        assert np.abs(gradient).max() > 1e-5, path
        np.testing.assert_allclose(other[path], gradient, atol=1e-6, err_msg=path)


INIT = {"layers": 2, "d_model": 32, "d_ff": 64, "head_dim": 8, "vocab_size": 64, "classes": 4}


@functools.cache
def initial(devices: int = 1):
    mesh = mesh_of(1) if devices == 1 else mesh_of(8, data=2, fsdp=2, tensor=2)
    return init(model_config(**INIT), 7, mesh)


def test_init_of_some_leaves_gives_the_values_that_they_have_in_the_whole_model():
    some = {"head/kernel", "layers/mlp/down/kernel"}
    alone = init(model_config(**INIT), 7, mesh_of(1), only=some)
    whole = leaf_digests(initial())
    assert leaf_digests(alone) == {path: whole[path] for path in some}


def test_init_has_the_documented_standard_deviations():
    layers, width = INIT["layers"], INIT["d_model"]
    small, residual = np.sqrt(2 / (5 * width)), 2 / (layers * np.sqrt(width))
    for path, leaf in flatten(initial()).items():
        leaf = np.asarray(leaf)
        if path.endswith("scale"):
            assert np.all(leaf == 1), path
        elif path.endswith("bias"):
            assert np.all(leaf == 0), path
        else:
            expected = residual if path.split("/")[-2] in ("out", "down") else small
            # the standard error of a standard deviation of n normals is sigma / sqrt(2 n)
            assert leaf.std() == pytest.approx(expected, rel=4 / np.sqrt(2 * leaf.size)), path
            assert abs(leaf.mean()) < 4 * expected / np.sqrt(leaf.size), path


def test_init_gives_each_layer_and_each_leaf_its_own_numbers():
    stacks = flatten(initial()["layers"])
    layers = [leaf[i].ravel()[:16] for path, leaf in stacks.items() if path.endswith("kernel") for i in range(2)]
    assert len({np.asarray(each).tobytes() for each in layers}) == len(layers)


def test_on_eight_devices_init_gives_the_same_values_and_no_device_holds_a_whole_matrix():
    params = initial(devices=8)
    for path, (leaf, single) in {
        path: (leaf, flatten(initial())[path]) for path, leaf in flatten(params).items()
    }.items():
        np.testing.assert_allclose(leaf, single, rtol=1e-6, atol=1e-7, err_msg=path)
    expected = {
        "embed/embedding": (32, 16),
        "head/kernel": (16, 4),
        "layers/attention/query/kernel": (2, 16, 2, 8),
        "layers/attention/key/kernel": (2, 16, 1, 8),
        "layers/attention/out/kernel": (2, 2, 8, 16),
        "layers/mlp/gate/kernel": (2, 16, 32),
        "layers/mlp/down/kernel": (2, 32, 16),
    }
    for path, shape in expected.items():
        shards = flatten(params)[path].addressable_shards
        assert {shard.data.shape for shard in shards} == {shape}, path
        assert len(shards) == 8

"""Every implementation of attention against plain softmax, with documents, and with its gradients."""

import dataclasses
import importlib
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm3.errors import UserError
from llm3.models.attention import blockwise
from llm3.models.attention.choice import IMPLEMENTATIONS, Call, choose, explained, why_not
from llm3.models.attention.of_layers import attention_notes, attentions, calls_of
from llm3.models.attention.pattern import Pattern, Places
from llm3.models.attention.sharded import on_shards
from tests.helpers.meshes import mesh_of
from tests.helpers.tiny import jit, model_config

B, H, K, h = 2, 4, 2, 8
# tokens of the documents of each row; the last ones of the second row are padding
SHORT = [18, 6, 16], [10, 25, 5]
LONG = [170, 60, 154], [100, 236, 48]  # 3 blocks of 128
CASES = {
    "causal": {},
    "bidirectional": {"causal": False},
    "window": {"window": 5},
    "bidirectional window": {"window": 7, "causal": False},
    "prefix": {"prefix": True},
}


def places(documents=SHORT):
    """Positions and segments, int32 [B, T] each."""
    segments = [np.repeat(numbers, row) for numbers, row in zip(([1, 2, 3], [1, 2, 0]), documents, strict=True)]
    positions = [np.concatenate([np.arange(length) for length in row]) for row in documents]
    return Places(np.array(positions, np.int32), np.array(segments, np.int32))


def pattern(documents=SHORT, causal=True, window=0, prefix=False, in_order=True):
    each = Places(*map(jnp.asarray, places(documents)))
    return Pattern(each, each, each.positions < 4 if prefix else None, causal, window, in_order)


def arrays(documents=SHORT):
    keys, length = jax.random.split(jax.random.key(0), 4), sum(documents[0])
    return [jax.random.normal(key, (B, length, heads, h)) for key, heads in zip(keys, (H, K, K, H), strict=True)]


def reference(query, key, value, allowed, softcap=0.0):
    """Plain softmax, of repeated keys and values. allowed: bool [B, T, S]."""
    key, value = (jnp.repeat(each, H // K, axis=2) for each in (key, value))
    scores = jnp.einsum("bthd,bshd->bhts", query, key, precision="highest") / np.sqrt(h)
    scores = softcap * jnp.tanh(scores / softcap) if softcap else scores
    weights = jax.nn.softmax(jnp.where(allowed[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", weights, value, precision="highest")


def allowed(documents=SHORT, causal=True, window=0, prefix=False):
    """The pattern in loops, from its words."""
    positions, segments = places(documents)
    table = np.zeros((*positions.shape, positions.shape[1]), bool)
    for b, t, s in np.ndindex(table.shape):
        distance = int(positions[b, t]) - int(positions[b, s])
        seen = not causal or distance >= 0 or (prefix and positions[b, s] < 4)
        near = not window or (abs(distance) < window if causal else abs(distance) <= window // 2)
        table[b, t, s] = segments[b, t] == segments[b, s] and seen and near
    return table


def large_call(platform, **changes):
    """A call with too many scores to hold, which every kernel of the platform serves without the changes."""
    plain = {"causal": True, "prefix": False, "window": 0, "softcap": 0.0, "in_order": True}
    return Call(
        **plain | {"queries": 1 << 14, "keys": 1 << 14, "head_dim": 128, "dtype": "bfloat16"} | changes,
        platform=platform,
    )


def with_gradients(attend):
    """attend(*inputs) and its gradients, of the inputs and the gradient of the result."""

    def compute(inputs, dy):
        y, pull_back = jax.vjp(attend, *inputs)
        return y, pull_back(dy)

    return jit(compute)


def assert_plain_softmax(attend, documents, case, softcap):
    """And its gradients; a document reads the same bits whatever stands in another one."""
    *inputs, dy = arrays(documents)
    compute = with_gradients(partial(attend, pattern=pattern(documents, **CASES[case]), softcap=softcap))
    plain = with_gradients(partial(reference, allowed=allowed(documents, **CASES[case]), softcap=softcap))
    real = np.asarray(places(documents).segments > 0)[..., None, None]
    (y, gradients), (expected, expected_gradients) = compute(inputs, dy * real), plain(inputs, dy * real)
    np.testing.assert_allclose(y * real, expected * real, atol=2e-6)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    first = documents[0][0]
    changed, _ = compute([each.at[:, :first].add(1.0) for each in inputs], dy * real)
    np.testing.assert_array_equal(changed[0, first:], y[0, first:])
    assert np.abs(changed[0, :first] - y[0, :first]).max() > 0.1


@pytest.mark.parametrize(("case", "softcap"), [*((case, 0.0) for case in CASES), ("prefix", 2.0)])
def test_blockwise_equals_plain_softmax_with_its_gradients(case, softcap):
    assert_plain_softmax(partial(blockwise.attend, block=16), SHORT, case, softcap)  # 2.5 blocks


CHOSEN = [("gpu", "causal", 0.0), ("tpu", "window", 2.0)]
MORE = [("gpu", "bidirectional", 0.0), ("tpu", "causal", 0.0), ("tpu", "bidirectional", 2.0)]
MORE += [("tpu", "bidirectional window", 0.0)]
CHOSEN += [pytest.param(*each, marks=pytest.mark.slow) for each in MORE]


@pytest.mark.parametrize(("platform", "case", "softcap"), CHOSEN)
def test_the_kernel_that_is_chosen_equals_plain_softmax_with_its_gradients(platform, case, softcap):
    """Interpreted: on its own device it computes the same in another order."""
    name = choose(large_call(platform, softcap=softcap, **CASES[case]))
    assert name == {"gpu": "pallas", "tpu": "splash"}[platform]
    module = importlib.import_module(f"llm3.models.attention.{IMPLEMENTATIONS[name].module}")
    assert_plain_softmax(partial(module.attend, interpret=True), LONG, case, softcap)


def test_nothing_is_chosen_that_would_ignore_a_part_of_the_pattern():
    """Every kernel is called with what it reads, and no more: its signature has no place for a prefix."""
    large = large_call("cpu")
    changes = {"prefix": True, "window": 512, "softcap": 30.0, "in_order": False, "queries": 1000}
    refused = {
        (platform, field): choose(dataclasses.replace(large, platform=platform, **{field: value})) == "blockwise"
        for platform, (field, value) in itertools.product(("gpu", "tpu"), changes.items())
    }
    read = {("tpu", "window"), ("tpu", "softcap")}
    assert refused == {each: each not in read for each in refused}
    assert choose(large) == "blockwise"
    changes = {each: {each: value} for each, value in changes.items()} | {
        "window of an encoder": {"window": 512, "causal": False},
        "float32": {"dtype": "float32"},
        "odd head": {"head_dim": 100},
        "large head": {"head_dim": 264},
    }
    served = {each for each, change in changes.items() if not why_not("cudnn", large_call("gpu", **change))}
    assert served == {"window", "queries"}
    few = dataclasses.replace(large, queries=256, keys=256)
    assert {choose(dataclasses.replace(few, platform=each, prefix=True)) for each in ("cpu", "gpu", "tpu")} == {"plain"}


def test_the_choice_is_explained_and_an_implementation_that_cannot_serve_is_refused():
    large = large_call("gpu", window=512)
    assert explained(large) == "blockwise (in XLA, with memory linear in the length; pallas serves no windows)"
    assert explained(dataclasses.replace(large, window=0)) == "pallas (a Pallas kernel for NVIDIA GPUs)"
    with pytest.raises(UserError, match=r"attention=.splash. serves only TPUs; possible here: .*blockwise"):
        choose(large, "splash")
    mixed = model_config(window=512, full_attention_layers=(0,))
    calls = calls_of(mixed, 1 << 14, "gpu", prefix=False, cut=False)
    assert attentions(calls, "auto") == {"pallas", "blockwise"}
    assert attention_notes(calls, "auto") == [
        "attention of layers without a window: pallas (a Pallas kernel for NVIDIA GPUs)",
        "attention of layers with window 512: "
        "blockwise (in XLA, with memory linear in the length; pallas serves no windows)",
    ]


@pytest.mark.parametrize("sizes", [{"data": 2, "tensor": 4}, {"tensor": 2, "context": 2, "data": 2}])
def test_each_device_computes_its_own_rows_heads_and_queries(sizes):
    """Also where the mesh cuts the heads into more pieces than the keys have."""
    *inputs, dy = arrays()
    kernel = partial(blockwise.attend, block=16)

    def shards(*each):
        return on_shards(kernel, *each, pattern())

    with jax.set_mesh(mesh_of(8, **sizes)):
        y, pull = jax.vjp(jax.jit(shards), *inputs)
        gradients = pull(dy)
    expected, expected_pull = jax.vjp(partial(reference, allowed=allowed()), *inputs)
    np.testing.assert_allclose(y, expected, atol=2e-6)
    for ours, theirs in zip(gradients, expected_pull(dy), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("case", [each for each in CASES if each != "prefix"])
def test_the_bounds_of_the_keys_are_the_first_and_the_last_that_count(case):
    first, stop = pattern(**CASES[case]).key_bounds()
    table, keys = allowed(**CASES[case]), np.arange(40)
    np.testing.assert_array_equal((keys >= first[..., None]) & (keys < stop[..., None]), table)


@pytest.mark.parametrize("case", [each for each in CASES if each != "prefix"])
def test_tokamax_reads_the_pattern(case):
    """Its form in XLA, which takes the same bounds as its kernels."""
    pytest.importorskip("tokamax")
    attend = importlib.import_module("llm3.models.attention.gpu_tokamax").attend
    assert_plain_softmax(partial(attend, interpret=True), SHORT, case, 2.0)


def test_blocks_that_share_no_document_are_skipped():
    meet = pattern().blocks_that_meet(8, 8)
    table = allowed().reshape(B, 5, 8, 5, 8).any((0, 2, 4))
    assert not np.any(table & ~np.asarray(meet)), "a block that matters is skipped"
    np.testing.assert_array_equal(meet, table)
    window = np.asarray(pattern(window=5).blocks_that_meet(4, 4))
    np.testing.assert_array_equal(window, allowed(window=5).reshape(B, 10, 4, 10, 4).any((0, 2, 4)))


def test_memory_is_linear_in_the_length():
    def temporary(length):
        q, k = (jax.ShapeDtypeStruct((1, length, heads, h), jnp.float32) for heads in (H, K))
        of = jax.ShapeDtypeStruct((1, length), jnp.int32)
        where = Pattern(Places(of, of), Places(of, of), None, True, 0, True)
        loss = lambda *each: blockwise.attend(*each, block=64).sum()  # noqa: E731
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, k, where).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = temporary(512), temporary(2048)
    assert many < 4.5 * few

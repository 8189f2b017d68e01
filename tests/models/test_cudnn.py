"""cuDNN's packed attention as far as it can be seen without a GPU: what it is given, and what it would make of that."""

import json
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.cudnn import fused_attention_stablehlo as kernels

from llm3.errors import UserError
from llm3.models.attention import blockwise, gpu_cudnn
from llm3.models.attention.choice import choose, explained
from llm3.models.attention.pattern import Pattern, Places
from llm3.models.attention.sharded import on_shards
from tests.helpers.meshes import mesh_of
from tests.models.test_attention import CASES, SHORT, assert_plain_softmax, large_call, pattern

MOST = 4  # documents of a row
DOCUMENTS = jax.jit(gpu_cudnn.documents, static_argnums=1)


def operation(
    query, key, value, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, mask_type, sliding_window_length
):
    """What cuDNN documents: each sequence is so many tokens from an offset in memory. NaN where there is none.

    jax makes offsets in memory of those in rows.
    """
    lengths, key_lengths, offsets, key_offsets = kernels._fix_seqlen_offsets(
        q_seqlen, kv_seqlen, q_offsets, kv_offsets, query, key
    )

    def places(x, lengths, offsets):
        """The place of each token of the batch in each sequence, and whether it is in it: [sequences, B * T]."""
        first = offsets.ravel()[: lengths.size] // (x.shape[2] * x.shape[3])
        place = jnp.arange(x.shape[0] * x.shape[1]) - first[:, None]
        return place, (place >= 0) & (place < lengths.ravel()[:, None])

    (place, inside), (key_place, key_inside) = places(query, lengths, offsets), places(key, key_lengths, key_offsets)
    distance = place[:, :, None] - key_place[:, None]
    seen = inside[:, :, None] & key_inside[:, None]
    if mask_type == kernels.MaskType.PADDING_CAUSAL:
        seen &= distance >= 0
    if sliding_window_length:
        seen &= distance < sliding_window_length
    tokens = [each.reshape(-1, *each.shape[2:]) for each in (query, key, value)]
    scores = scale * jnp.einsum("tnd,snd->nts", *tokens[:2], precision="highest")
    weights = jax.nn.softmax(jnp.where(seen.any(0), scores, -jnp.inf), axis=-1)
    return jnp.einsum("nts,snd->tnd", weights, tokens[2], precision="highest").reshape(query.shape)


@pytest.mark.parametrize("case", ["causal", "bidirectional", "window"])
def test_the_operation_on_what_it_is_given_is_plain_softmax_with_documents(case, monkeypatch):
    monkeypatch.setattr(kernels, "dot_product_attention", operation)
    monkeypatch.setattr(blockwise, "attend", lambda query, *_: query * jnp.nan)
    assert_plain_softmax(partial(gpu_cudnn.attend, most=3), SHORT, case, 0.0)  # as many as the rows have


def test_rows_with_too_many_documents_are_computed_in_blocks(monkeypatch):
    """The operation would leave out their last documents."""
    monkeypatch.setattr(kernels, "dot_product_attention", operation)
    assert_plain_softmax(partial(gpu_cudnn.attend, most=2), SHORT, "causal", 0.0)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sets(st.integers(1, 15), max_size=MOST), min_size=2, max_size=2))
def test_documents_are_the_runs_of_a_row(cuts):
    edges = [[0, *sorted(each), 16] for each in cuts]
    runs = [np.diff(each).tolist() for each in edges]
    rows = np.array([np.repeat([1, 2, 3, 4, 0][-len(each) :], each) for each in runs], np.int32)
    lengths, offsets, fits = jax.device_get(DOCUMENTS(rows, MOST))
    assert fits == all(len(each) <= MOST for each in runs)
    for row, own in enumerate(runs if fits else []):
        rest = [-1] * (MOST - len(own))
        assert lengths[row].tolist() == own + rest
        assert offsets[row].tolist() == edges[row][:-1] + rest + [-1]


def gpu_calls(text):
    """{target: its options, the types of its operands} of calls of cuDNN in a lowered program."""
    calls = re.findall(
        r'custom_call @(__cudnn\S+?)\(.*backend_config = "(.*?)", operand_layouts.* : \((.*?)\) ->', text
    )
    options = lambda each: json.loads(each.replace(r"\22", '"').replace(r"\220", '"0'))  # noqa: E731
    return {name: (options(config)["cudnn_fmha_backend_config"], types.split(", ")) for name, config, types in calls}


@pytest.mark.parametrize(("case", "mask", "window"), [("window", "PADDING_CAUSAL", 5), ("bidirectional", "PADDING", 0)])
def test_the_program_for_gpus_calls_cudnn_with_documents_mask_and_window(case, mask, window, monkeypatch):
    """Forward and backward, each device with its own rows and heads."""
    monkeypatch.setattr(kernels, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(kernels, "check_compute_capability", lambda capability: True)

    def loss(query, key, value):
        return on_shards(partial(gpu_cudnn.attend, scale=0.5), query, key, value, pattern(**CASES[case])).sum()

    shapes = [jax.ShapeDtypeStruct((2, 40, heads, 8), jnp.bfloat16) for heads in (4, 2, 2)]
    with jax.set_mesh(mesh_of(4, data=2, tensor=2)):
        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*shapes)
        calls = gpu_calls(traced.lower(lowering_platforms=("cuda",)).as_text())
    row, places = "tensor<1x40x2x8xbf16>", ["tensor<1x64xi32>"] * 2 + ["tensor<1x65xi32>"] * 2
    kept = ["tensor<64x2x40xf32>", row, row]  # statistics of the softmax, and the result and its gradient
    for name, types in {"": [row] * 3, "Backward": [row] * 3 + kept}.items():
        options, operands = calls.pop("__cudnn$fmhaSoftmax" + name)
        assert operands == types + places
        assert (options["mask_type"], options["sliding_window_length"]) == (mask, window)
        assert (options["max_seg_per_batch"], options["fmha_scale"], options["dropout_rate"]) == (64, 0.5, 0)
    assert not calls


def test_machines_and_batches_that_cudnn_cannot_serve_are_refused(monkeypatch):
    call = large_call("gpu")
    assert explained(call, "cudnn") == "cudnn (as config.model.attention says)"  # of a machine that is not here
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(UserError, match=r"'cudnn' serves only Hopper and later .*; possible here: .*blockwise"):
        choose(call, "cudnn")
    monkeypatch.setattr(kernels, "cuda_versions", object())
    monkeypatch.setattr(kernels, "check_compute_capability", lambda capability: True)
    assert choose(call, "cudnn") == "cudnn"
    large = jax.ShapeDtypeStruct((16, 1 << 15, 32, 128), jnp.bfloat16)
    places = Places(*[jax.ShapeDtypeStruct((16, 1 << 15), jnp.int32)] * 2)
    with pytest.raises(UserError, match=r"2\^31 numbers or more"):
        jax.eval_shape(gpu_cudnn.attend, large, large, large, Pattern(places, places, None, True, 0, True))

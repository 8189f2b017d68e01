"""Attention on TPUs by jax's Pallas kernel "splash", which skips blocks by its mask and reads documents.

Heads that share keys are one call of its multi-query form, so that no key is repeated.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as shapes

from llm3.models.attention.pattern import Pattern
from llm3.models.attention.plain import grouped, scaled, ungrouped

LANES = 128  # of a TPU: lengths and blocks are multiples
BLOCK = 512  # of queries and keys, where it divides the length


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    pattern: Pattern,
    scale: float = 0.0,
    softcap: float = 0.0,
    interpret: bool = False,
) -> jax.Array:
    """softmax(scale q k^T) v where the pattern allows; arguments and result as of `plain.attend`.

    The pattern is in order and without a prefix, and the length a multiple of `LANES`. interpret: run it on a CPU.
    """
    batch, length, heads, _ = query.shape
    kv_heads = key.shape[2]
    groups = heads // kv_heads
    kernel = kernels.make_splash_mqa(
        mask=shapes.MultiHeadMask([_mask(pattern, length)] * groups),
        block_sizes=_blocks(length),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap or None,
        interpret=interpret,
    )
    segments = kernels.SegmentIds(pattern.queries.segments, pattern.keys.segments)
    query = grouped(scaled(query, scale), kv_heads).reshape(batch, kv_heads, groups, length, -1)
    y = _in_own_precision(kernel, segments, query, key.swapaxes(1, 2), value.swapaxes(1, 2))
    return ungrouped(y.astype(value.dtype))


@jax.custom_vjp
def _in_own_precision(kernel: Any, segments: Any, *arrays: jax.Array) -> jax.Array:
    """The kernel on query [B, K, G, T, h], key and value [B, K, T, h], with products in the precision of these.

    In both passes: they take what `jax.default_matmul_precision` says when they are traced, and float32 does not
    compile for bfloat16.
    """
    return _forward(kernel, segments, *arrays)[0]


def _forward(kernel: Any, segments: Any, *arrays: jax.Array) -> tuple[jax.Array, Callable]:
    of_heads = jax.vmap(lambda segments, *each: kernel(*each, segment_ids=segments), (None, 0, 0, 0))
    with jax.default_matmul_precision(_precision(arrays[0])):
        return jax.vjp(partial(jax.vmap(of_heads), segments), *arrays)


def _backward(pull_back: Callable, dy: jax.Array) -> tuple:
    with jax.default_matmul_precision(_precision(dy)):
        return (None, None, *pull_back(dy))


def _precision(operand: jax.Array) -> str:
    return "float32" if operand.dtype == jnp.float32 else "default"


_in_own_precision.defvjp(_forward, _backward)


def _mask(pattern: Pattern, length: int) -> shapes.Mask:
    square, window = (length, length), pattern.window
    if pattern.causal:
        return shapes.LocalMask(square, (window - 1, 0), 0) if window else shapes.CausalMask(square)
    return shapes.LocalMask(square, (window // 2, window // 2), 0) if window else shapes.FullMask(square)


def _blocks(length: int) -> kernels.BlockSizes:
    block = next(size for size in (BLOCK, 256, LANES) if length % size == 0)
    return kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )

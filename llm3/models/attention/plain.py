"""Attention with all scores in memory: the fastest for short windows, and on a CPU.

Its hand-written backward pass is 1.3 times as fast, forward and backward, on two cores, as the one that XLA derives.
"""

from functools import partial

import jax
import jax.numpy as jnp

from llm3.models.kernels import precision

BLOCKS = 4  # blocks of queries without a gradient; more blocks skip more keys, but make smaller products


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    causal: bool = False,
    scale: float = 0.0,
    softcap: float = 0.0,
) -> jax.Array:
    """softmax(scale q k^T) v where `mask` allows. Grouped queries: head n reads key-value head n // (H // K).

    query: [B, T, H, h]; key, value: [B, S, K, h]; mask: bool [B, 1, T, S]. Scores and softmax are float32.
    causal: T is S, and no query attends to a later position, whatever `mask` allows there. Without a gradient, the
    queries are then processed in blocks, which skip the keys after them. scale: 0: 1 / sqrt(h). softcap: cap scores at
    this magnitude, before the mask: softcap tanh(score / softcap) (Riviere et al. 2024, Gemma 2, section 2); 0: no cap.

    The softmax is normalised after the second product, which divides [T, h] instead of [T, S] values. The backward
    pass uses sum_s p dp = dy . y (both as in Dao et al. 2022, FlashAttention, appendix B).
    """
    length = query.shape[1]
    size = length // (query_blocks(length) if causal else 1)
    options = causal, scale, softcap
    parts = [
        _attend_forward(
            query[:, stop - size : stop],
            key[:, :stop],
            value[:, :stop],
            mask[:, :, stop - size : stop, :stop],
            *options,
        )[0]
        for stop in (range(size, length + 1, size) if causal else ())
    ]
    return jnp.concatenate(parts, axis=1) if parts else _attend_forward(query, key, value, mask, *options)[0]


def query_blocks(length: int) -> int:
    """The number of blocks into which `attend` cuts causal queries without a gradient."""
    return BLOCKS if length % BLOCKS == 0 else 1


def grouped(x: jax.Array, kv_heads: int) -> jax.Array:
    """[B, T, H, h] as [B, K, H / K, T, h], or [B, K, T, h] without groups. Each axis may be sharded."""
    batch, length, heads, size = x.shape
    groups = () if heads == kv_heads else (heads // kv_heads,)
    return x.swapaxes(1, 2).reshape(batch, kv_heads, *groups, length, size)


def ungrouped(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], -1, *x.shape[-2:]).swapaxes(1, 2)


def scaled(query: jax.Array, scale: float) -> jax.Array:
    """The query times the scale, or times 1 / sqrt(h) if it is 0, rounded to its dtype."""
    return (query.astype(jnp.float32) * (scale or query.shape[-1] ** -0.5)).astype(query.dtype)


def einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """The float32 result of an einsum of two arrays of one dtype."""
    return jnp.einsum(spec, a, b, precision=precision(a), preferred_element_type=jnp.float32)


def _attend_forward(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, causal: bool, scale: float, softcap: float
) -> tuple[jax.Array, tuple[jax.Array | None, ...]]:
    query = grouped(scaled(query, scale), key.shape[2])
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    g = "g" * (query.ndim - 4)
    # a bias, not a select: one array serves all layers, and XLA fuses the addition into the product
    bias = jnp.where(mask, 0.0, -1e30)
    bias = bias[:, :, None] if g else bias
    scores, slope = capped(einsum(f"bk{g}td,bksd->bk{g}ts", query, key), softcap)
    scores += bias
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights.astype(value.dtype)
    y = einsum(f"bk{g}ts,bksd->bk{g}td", weights, value) / total
    y = y.astype(value.dtype)
    return ungrouped(y), (query, key, value, weights, total, y, None if slope is None else slope.astype(value.dtype))


def capped(scores: jax.Array, softcap: float) -> tuple[jax.Array, jax.Array | None]:
    """The capped scores and the derivative of the cap; None: 1 everywhere."""
    if not softcap:
        return scores, None
    share = jnp.tanh(scores / softcap)
    return softcap * share, 1 - jnp.square(share)


def _attend_backward(
    causal: bool, scale: float, softcap: float, saved: tuple[jax.Array, ...], dy: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    query, key, value, weights, total, y, slope = saved
    g, dtype = "g" * (query.ndim - 4), value.dtype
    dy = (grouped(dy, key.shape[1]) / total).astype(dtype)  # the gradient before the division by `total`
    dvalue = einsum(f"bk{g}ts,bk{g}td->bksd", weights, dy)
    dweights = einsum(f"bk{g}td,bksd->bk{g}ts", dy, value)
    correction = jnp.sum(dy.astype(jnp.float32) * y.astype(jnp.float32), axis=-1, keepdims=True)
    dscores = (weights * (dweights - correction)).astype(dtype)
    dscores = dscores if slope is None else dscores * slope
    dquery = einsum(f"bk{g}ts,bksd->bk{g}td", dscores, key) * (scale or query.shape[-1] ** -0.5)
    dkey = einsum(f"bk{g}ts,bk{g}td->bksd", dscores, query)
    dquery, dkey, dvalue = (each.astype(dtype) for each in (dquery, dkey, dvalue))
    return ungrouped(dquery), dkey.swapaxes(1, 2), dvalue.swapaxes(1, 2), None


attend.defvjp(_attend_forward, _attend_backward)

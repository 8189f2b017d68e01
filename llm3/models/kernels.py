"""Linear layers, the embedding and attention, with hand-written backward passes.

The backward passes that XLA derives on CPU make transposed copies of activations. On two cores, the weight gradient
below is 2.5 times as fast as the derived one, and attention (forward and backward) 1.3 times.

Sums over tokens, among them the gradients of all parameters, are float32 in any compute dtype, and so are logits. Only
products over features leave their sum in the compute dtype: it is rounded once, and where `tensor` shards the features,
the all-reduce of activations moves half the bytes. Float32 operands are multiplied as float32 on accelerators too,
which by default round them to TF32 or bfloat16.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from llm3.distributed.sharding import constrain


def dot(a: jax.Array, b: jax.Array, axes: tuple, dtype: Any = None) -> jax.Array:
    """The product of two arrays of one dtype, contracted over `axes` = (axes of a, axes of b).

    dtype: of the sums and the result; None: the dtype of the operands.
    """
    kind = dtype or a.dtype
    return jax.lax.dot_general(a, b, (axes, ((), ())), precision=_precision(a), preferred_element_type=kind)


def _precision(operand: jax.Array) -> jax.lax.Precision:
    return jax.lax.Precision.HIGHEST if operand.dtype == jnp.float32 else jax.lax.Precision.DEFAULT


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(x: jax.Array, kernel: jax.Array, dtype: Any = None) -> jax.Array:
    """x @ kernel. x: [B, T, inputs], kernel: [inputs, outputs], result [B, T, outputs] in `dtype` (None: that of x)."""
    return _linear_forward(x, kernel, dtype)[0]


def _linear_forward(x: jax.Array, kernel: jax.Array, dtype: Any) -> tuple[jax.Array, tuple]:
    # does not call `linear`: a remat policy for dots does not look inside a custom_vjp
    return dot(x, kernel.astype(x.dtype), ((2,), (0,)), dtype), (x, kernel)


def _linear_backward(dtype: Any, saved: tuple, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    dy = dy.astype(x.dtype)
    dx = dot(dy, kernel.astype(x.dtype), ((2,), (1,)))
    dkernel = dot(x, dy, ((0, 1), (0, 1)), jnp.float32)  # x on the left: no transposed copy
    return dx, dkernel.astype(kernel.dtype)


linear.defvjp(_linear_forward, _linear_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def embed(table: jax.Array, tokens: jax.Array, dtype: Any, axis: str | None = "vocab") -> jax.Array:
    """The rows of the table [V, D] for the tokens, int32 [B, T]: [B, T, D] in `dtype`, with a float32 gradient.

    axis: the logical axis of the rows.
    """
    return _gathered(table, dtype, axis)[tokens]


def _gathered(table: jax.Array, dtype: Any, axis: str | None = "vocab") -> jax.Array:
    """The table in the compute dtype, gathered over fsdp, whose sharding of rows does not match the batch."""
    return constrain(table.astype(dtype), axis, None)


def _embed_forward(table: jax.Array, tokens: jax.Array, dtype: Any, axis: str | None) -> tuple[jax.Array, tuple]:
    return _gathered(table, dtype, axis)[tokens], (table, tokens)


def _embed_backward(dtype: Any, axis: str | None, saved: tuple, dy: jax.Array) -> tuple[jax.Array, None]:
    table, tokens = saved
    dtable = jnp.zeros(table.shape, jnp.float32).at[tokens].add(dy.astype(jnp.float32))
    return constrain(dtable, axis, None).astype(table.dtype), None


embed.defvjp(_embed_forward, _embed_backward)


@jax.custom_vjp
def unembed(x: jax.Array, table: jax.Array) -> jax.Array:
    """The logits x @ table^T, float32 [B, T, V]. x: [B, T, D], table: [V, D]; the product is in x's dtype."""
    return _unembed_forward(x, table)[0]


def _unembed_forward(x: jax.Array, table: jax.Array) -> tuple[jax.Array, tuple]:
    gathered = _gathered(table, x.dtype)
    return dot(x, gathered, ((2,), (1,)), jnp.float32), (x, gathered, table)


def _unembed_backward(saved: tuple, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, gathered, table = saved
    dy = dy.astype(x.dtype)
    dtable = dot(dy, x, ((0, 1), (0, 1)), jnp.float32)
    return dot(dy, gathered, ((2,), (0,))), constrain(dtable, "vocab", None).astype(table.dtype)


unembed.defvjp(_unembed_forward, _unembed_backward)


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


def _grouped(x: jax.Array, kv_heads: int) -> jax.Array:
    """[B, T, H, h] as [B, K, H / K, T, h], or [B, K, T, h] without groups. Each axis may be sharded."""
    batch, length, heads, size = x.shape
    groups = () if heads == kv_heads else (heads // kv_heads,)
    return x.swapaxes(1, 2).reshape(batch, kv_heads, *groups, length, size)


def _ungrouped(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], -1, *x.shape[-2:]).swapaxes(1, 2)


def _einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """The float32 result of an einsum of two arrays of one dtype."""
    return jnp.einsum(spec, a, b, precision=_precision(a), preferred_element_type=jnp.float32)


def _attend_forward(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, causal: bool, scale: float, softcap: float
) -> tuple[jax.Array, tuple[jax.Array | None, ...]]:
    scaled = (query.astype(jnp.float32) * (scale or query.shape[-1] ** -0.5)).astype(query.dtype)
    query = _grouped(scaled, key.shape[2])
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    g = "g" * (query.ndim - 4)
    # a bias, not a select: one array serves all layers, and XLA fuses the addition into the product
    bias = jnp.where(mask, 0.0, -1e30)
    bias = bias[:, :, None] if g else bias
    scores, slope = _capped(_einsum(f"bk{g}td,bksd->bk{g}ts", query, key), softcap)
    scores += bias
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights.astype(value.dtype)
    y = _einsum(f"bk{g}ts,bksd->bk{g}td", weights, value) / total
    y = y.astype(value.dtype)
    return _ungrouped(y), (query, key, value, weights, total, y, None if slope is None else slope.astype(value.dtype))


def _capped(scores: jax.Array, softcap: float) -> tuple[jax.Array, jax.Array | None]:
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
    dy = (_grouped(dy, key.shape[1]) / total).astype(dtype)  # the gradient before the division by `total`
    dvalue = _einsum(f"bk{g}ts,bk{g}td->bksd", weights, dy)
    dweights = _einsum(f"bk{g}td,bksd->bk{g}ts", dy, value)
    correction = jnp.sum(dy.astype(jnp.float32) * y.astype(jnp.float32), axis=-1, keepdims=True)
    dscores = (weights * (dweights - correction)).astype(dtype)
    dscores = dscores if slope is None else dscores * slope
    dquery = _einsum(f"bk{g}ts,bksd->bk{g}td", dscores, key) * (scale or query.shape[-1] ** -0.5)
    dkey = _einsum(f"bk{g}ts,bk{g}td->bksd", dscores, query)
    dquery, dkey, dvalue = (each.astype(dtype) for each in (dquery, dkey, dvalue))
    return _ungrouped(dquery), dkey.swapaxes(1, 2), dvalue.swapaxes(1, 2), None


attend.defvjp(_attend_forward, _attend_backward)

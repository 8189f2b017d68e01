"""Attention in blocks of queries and keys, whose memory is linear in their number, in XLA on any device.

Online softmax (Milakov and Gimelshein 2018) in the forward pass and recomputed weights in the backward pass, as in Dao
et al. 2022, FlashAttention, algorithms 1 and 4. Blocks of queries and keys that no document shares are skipped.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llm3.models.attention.pattern import Pattern
from llm3.models.attention.plain import capped, einsum, grouped, scaled, ungrouped

BLOCK = 512  # queries and keys of a block
NEVER = -1e30  # of scores that do not count: finite, so that a row without keys has no NaN


class Options(NamedTuple):
    """What does not change within a call: see `attend`."""

    scale: float
    softcap: float
    queries: int
    keys: int


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    pattern: Pattern,
    scale: float = 0.0,
    softcap: float = 0.0,
    block: int = BLOCK,
) -> jax.Array:
    """softmax(scale q k^T) v where the pattern allows; arguments and result as of `plain.attend`.

    block: queries and keys of a block. A query without any key gets 0.
    """
    sizes = [min(block, each.shape[1]) for each in (query, key)]
    more = [-each.shape[1] % size for each, size in zip((query, key), sizes, strict=True)]
    padded = [
        jnp.pad(each, ((0, 0), (0, count), (0, 0), (0, 0)))
        for each, count in zip((query, key, value), (more[0], more[1], more[1]), strict=True)
    ]
    y = _attend(*padded, pattern.padded(*more), Options(scale, softcap, *sizes))
    return y[:, : query.shape[1]]


def _blocks(x: jax.Array, size: int, axis: int) -> jax.Array:
    """x with `axis` cut into blocks, which come first: [blocks, ..., size, ...]."""
    axis %= x.ndim
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :]), axis, 0)


def _unblocked(x: jax.Array, axis: int) -> jax.Array:
    axis %= x.ndim - 1
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _spans(meet: jax.Array) -> tuple[jax.Array, jax.Array]:
    """For each row of a bool table, the first True and one after the last: 0, 0 if there is none."""
    some, count = meet.any(-1), meet.shape[-1]
    return jnp.where(some, meet.argmax(-1), 0), jnp.where(some, count - meet[:, ::-1].argmax(-1), 0)


def _scores(
    query: jax.Array, key: jax.Array, pattern: Pattern, softcap: float
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Scores, float32 [B, K, (G,) t, s], where they count, and the derivative of the cap, None without one."""
    g = "g" * (query.ndim - 4)
    scores, slope = capped(einsum(f"bk{g}td,bksd->bk{g}ts", query, key), softcap)
    mask = pattern.mask()[:, None]
    mask = mask[:, :, None] if g else mask
    return jnp.where(mask, scores, NEVER), mask, slope


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(query: jax.Array, key: jax.Array, value: jax.Array, pattern: Pattern, options: Options) -> jax.Array:
    return _forward(query, key, value, pattern, options)[0]


def _forward(
    query: jax.Array, key: jax.Array, value: jax.Array, pattern: Pattern, options: Options
) -> tuple[jax.Array, tuple]:
    scale, softcap, rows, columns = options
    queries = _blocks(grouped(scaled(query, scale), key.shape[2]), rows, -2)
    keys, values = (_blocks(each.swapaxes(1, 2), columns, 2) for each in (key, value))
    first, stop = _spans(pattern.blocks_that_meet(rows, columns))
    g = "g" * (queries.ndim - 5)

    def of_queries(_: None, block: tuple) -> tuple[None, tuple]:
        i, own, first, stop = block

        def body(j: jax.Array, state: tuple) -> tuple:
            greatest, total, y = state
            scores, mask, _ = _scores(own, keys[j], pattern.block(i * rows, rows, j * columns, columns), softcap)
            new = jnp.maximum(greatest, scores.max(-1, keepdims=True))
            weights = jnp.where(mask, jnp.exp(scores - new), 0.0)
            kept = jnp.exp(greatest - new)
            total = total * kept + weights.sum(-1, keepdims=True)
            part = einsum(f"bk{g}ts,bksd->bk{g}td", weights.astype(value.dtype), values[j])
            return new, total, y * kept + part

        column = jnp.full((*own.shape[:-1], 1), NEVER, jnp.float32)
        start = column, jnp.zeros_like(column), jnp.zeros(own.shape, jnp.float32)
        greatest, total, y = jax.lax.fori_loop(first, stop, body, start)
        total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
        return None, ((y / total).astype(value.dtype), greatest + jnp.log(total))

    _, (y, logsumexp) = jax.lax.scan(of_queries, None, (jnp.arange(len(queries)), queries, first, stop))
    return ungrouped(_unblocked(y, -2)), (queries, keys, values, pattern, y, logsumexp)


def _backward(options: Options, saved: tuple, dy: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    scale, softcap, rows, columns = options
    queries, keys, values, pattern, y, logsumexp = saved
    g, dtype = "g" * (queries.ndim - 5), values.dtype
    dy = _blocks(grouped(dy.astype(dtype), keys.shape[2]), rows, -2)
    corrections = jnp.sum(dy.astype(jnp.float32) * y.astype(jnp.float32), axis=-1, keepdims=True)
    first, stop = _spans(pattern.blocks_that_meet(rows, columns).T)

    def of_keys(dqueries: jax.Array, block: tuple) -> tuple[jax.Array, tuple]:
        j, key, value, first, stop = block

        def body(i: jax.Array, state: tuple) -> tuple:
            dqueries, dkey, dvalue = state
            own = pattern.block(i * rows, rows, j * columns, columns)
            scores, mask, slope = _scores(queries[i], key, own, softcap)
            weights = jnp.where(mask, jnp.exp(scores - logsumexp[i]), 0.0)
            dvalue += einsum(f"bk{g}ts,bk{g}td->bksd", weights.astype(dtype), dy[i])
            dscores = weights * (einsum(f"bk{g}td,bksd->bk{g}ts", dy[i], value) - corrections[i])
            dscores = (dscores if slope is None else dscores * slope).astype(dtype)
            dkey += einsum(f"bk{g}ts,bk{g}td->bksd", dscores, queries[i])
            dquery = einsum(f"bk{g}ts,bksd->bk{g}td", dscores, key)
            return dqueries.at[i].add(dquery), dkey, dvalue

        zero = jnp.zeros(key.shape, jnp.float32)
        dqueries, dkey, dvalue = jax.lax.fori_loop(first, stop, body, (dqueries, zero, zero))
        return dqueries, (dkey.astype(dtype), dvalue.astype(dtype))

    blocks = jnp.arange(len(keys)), keys, values, first, stop
    dqueries, (dkeys, dvalues) = jax.lax.scan(of_keys, jnp.zeros(queries.shape, jnp.float32), blocks)
    factor = scale or queries.shape[-1] ** -0.5
    dquery = ungrouped(_unblocked((dqueries * factor).astype(dtype), -2))
    return dquery, _unblocked(dkeys, 2).swapaxes(1, 2), _unblocked(dvalues, 2).swapaxes(1, 2), None


_attend.defvjp(_forward, _backward)

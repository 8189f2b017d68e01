"""Attention: the mask, rotary positions, and the module with its projections.

Shapes: B batch, T length, S keys, D d_model, H heads, K kv heads, h head_dim.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from llm3.config.schema import ModelConfig
from llm3.distributed.sharding import constrain
from llm3.models.kernels import attend
from llm3.models.layers import Norm, Projection, adapters_of, at_positions, projection_key, residual_init, small_init

Angles = tuple[jax.Array, jax.Array]


def rotation(positions: jax.Array, size: int, theta: float) -> Angles:
    """Sine and cosine of the rotary angles (Su et al. 2021, section 3.4): float32 [B, T, 1, size / 2] each."""
    half = size // 2
    angles = positions[..., None, None].astype(jnp.float32) * theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    # without the barrier, XLA fuses them into every use and recomputes them for every head of every layer
    return jax.lax.optimization_barrier((jnp.sin(angles), jnp.cos(angles)))


def rotate(x: jax.Array, sine: jax.Array, cosine: jax.Array) -> jax.Array:
    """x rotated by the angles of `rotation`, half-split layout. x: [B, T, heads, h]."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return rotated.astype(x.dtype)


def attention_mask(
    positions: jax.Array,
    segments: jax.Array,
    key_positions: jax.Array,
    key_segments: jax.Array,
    causal: bool,
    prefix: jax.Array | None = None,
) -> jax.Array:
    """Attention mask, bool [B, 1, T, S]: True where a query may attend to a key.

    Both must be in the same document and, if causal, the key at no later position.
    prefix: bool [B, S], keys to which all queries of their document may attend; None: no such keys.
    """
    mask = segments[:, :, None] == key_segments[:, None, :]
    if causal:
        not_later = positions[:, :, None] >= key_positions[:, None, :]
        mask &= not_later if prefix is None else not_later | prefix[:, None, :]
    return mask[:, None]


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al. 2023), optionally with QK-norm (Henry et al. 2020) and biases."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        c, small = config, small_init(config.d_model)
        heads, kv = {"heads": c.heads, "head_dim": c.head_dim}, {"kv_heads": c.kv_heads, "head_dim": c.head_dim}
        model = {"embed": c.d_model}

        def projection(name: str, inputs: dict, outputs: dict, init: Callable) -> Projection:
            adapters = adapters_of(c, name)
            return Projection(inputs, outputs, init=init, bias=c.attention_bias, adapters=adapters, rngs=rngs)

        self.query = projection("query", model, heads, small)
        self.key = projection("key", model, kv, small)
        self.value = projection("value", model, kv, small)
        self.out = projection("out", heads, model, residual_init(c.layers, c.d_model))
        norm = partial(Norm, c.head_dim, "head_dim", kind=c.norm, epsilon=c.norm_epsilon)
        self.query_norm = norm() if c.qk_norm else None
        self.key_norm = norm() if c.qk_norm else None

    def __call__(
        self,
        x: jax.Array,
        angles: Angles,
        mask: jax.Array,
        cache: dict | None,
        index: jax.Array | None,
        random: jax.Array | None,
        output_positions: jax.Array | None,
        in_order: bool,
    ) -> tuple[jax.Array, dict | None]:
        """x: [B, T, D]; angles: see `rotation`; mask: [B, 1, T, S]; cache: key, value [B, S, K, h], written at index.

        random: a key for dropout. output_positions: int32 [B, N], the positions of the result [B, N, D]; None: all.
        in_order: T is S, and the mask allows no key after the query.
        """
        query = self.query(at_positions(x, output_positions, 1), projection_key(random, "query"))
        key = self.key(x, projection_key(random, "key"))
        value = self.value(x, projection_key(random, "value"))
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        query = rotate(query, *(at_positions(each, output_positions, 1) for each in angles))
        key = constrain(rotate(key, *angles), "batch", "keys", "kv_heads", "head_dim")
        value = constrain(value, "batch", "keys", "kv_heads", "head_dim")
        if cache is not None and index is not None:
            write = jax.lax.dynamic_update_slice_in_dim
            key, value = write(cache["key"], key, index, axis=1), write(cache["value"], value, index, axis=1)
            cache = {"key": key, "value": value}
        y = attend(query, key, value, at_positions(mask, output_positions, 2), in_order and output_positions is None)
        return self.out(y, projection_key(random, "out")), cache

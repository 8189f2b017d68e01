"""The parts of a transformer block.

Shapes: B batch, T length, S keys, D d_model, H heads, K kv heads, h head_dim. Every parameter carries the names of its
axes as metadata; `llm3.sharding` says where each of them is cut.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from llm3.config import ModelConfig
from llm3.models.products import attend, linear

Axes = tuple[str | None, ...]


def small_init(d_model: int) -> Callable:
    """Normal with standard deviation sqrt(2 / (5 D)): Nguyen and Salazar 2019, section 3, as GPT-NeoX-20B uses it."""
    return nnx.initializers.normal(math.sqrt(2 / (5 * d_model)))


def residual_init(layers: int, d_model: int) -> Callable:
    """Normal with standard deviation 2 / (L sqrt(D)), for what writes to the residual stream.

    Black et al. 2022 (GPT-NeoX-20B), section 2.1.
    """
    return nnx.initializers.normal(2 / (layers * math.sqrt(d_model)))


class Projection(nnx.Module):
    """A linear map from the axes of x after [B, T] to `outputs`. kernel: float32 [*inputs, *outputs]."""

    def __init__(
        self,
        inputs: dict[str, int],
        outputs: dict[str, int],
        *,
        init: Callable,
        bias: bool = False,
        rngs: nnx.Rngs,
    ):
        self.outputs = tuple(outputs.values())
        shape = (*inputs.values(), *outputs.values())
        self.kernel = nnx.Param(init(rngs.params(), shape), axes=(*inputs, *outputs))
        self.bias = nnx.Param(jnp.zeros(tuple(outputs.values())), axes=tuple(outputs)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...].reshape(-1, math.prod(self.outputs))
        y = linear(x.reshape(*x.shape[:2], -1), kernel).reshape(*x.shape[:2], *self.outputs)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


class Norm(nnx.Module):
    """RMSNorm (Zhang and Sennrich 2019) or LayerNorm (Ba et al. 2016) over the last axis, computed in float32."""

    def __init__(self, size: int, axis: str | None, *, kind: str, epsilon: float):
        self.kind, self.epsilon = kind, epsilon
        self.scale = nnx.Param(jnp.ones((size,)), axes=(axis,))
        self.bias = nnx.Param(jnp.zeros((size,)), axes=(axis,)) if kind == "layernorm" else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        if self.kind == "layernorm":
            y = y - y.mean(axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + self.epsilon) * self.scale[...]
        return (y if self.bias is None else y + self.bias[...]).astype(x.dtype)


def rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotary positions (Su et al. 2021, section 3.4), half-split layout. x: [B, T, heads, h]; positions: [B, T]."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    sine, cosine = jnp.sin(angles), jnp.cos(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return rotated.astype(x.dtype)


def attention_mask(
    positions: jax.Array, segments: jax.Array, key_positions: jax.Array, key_segments: jax.Array, causal: bool
) -> jax.Array:
    """Who may look at whom: bool [B, 1, T, S]. Only inside one document and, if causal, never ahead."""
    mask = segments[:, :, None] == key_segments[:, None, :]
    if causal:
        mask &= positions[:, :, None] >= key_positions[:, None, :]
    return mask[:, None]


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al. 2023), optionally with QK-norm (Henry et al. 2020) and biases."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        c, self.theta = config, config.rope_theta
        small = small_init(c.d_model)
        heads, kv = {"heads": c.heads, "head_dim": c.head_dim}, {"kv_heads": c.kv_heads, "head_dim": c.head_dim}
        model = {"embed": c.d_model}
        self.query = Projection(model, heads, init=small, bias=c.attention_bias, rngs=rngs)
        self.key = Projection(model, kv, init=small, bias=c.attention_bias, rngs=rngs)
        self.value = Projection(model, kv, init=small, bias=c.attention_bias, rngs=rngs)
        self.out = Projection(heads, model, init=residual_init(c.layers, c.d_model), bias=c.attention_bias, rngs=rngs)
        norm = {"kind": c.norm, "epsilon": c.norm_epsilon}
        self.query_norm = Norm(c.head_dim, "head_dim", **norm) if c.qk_norm else None
        self.key_norm = Norm(c.head_dim, "head_dim", **norm) if c.qk_norm else None

    def __call__(
        self, x: jax.Array, positions: jax.Array, mask: jax.Array, cache: dict | None, index: jax.Array | None
    ) -> tuple[jax.Array, dict | None]:
        """x: [B, T, D]; mask: [B, 1, T, S]; cache: key and value [B, S, K, h], written at `index`."""
        query, key, value = self.query(x), self.key(x), self.value(x)
        if self.query_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key = rotate(query, positions, self.theta), rotate(key, positions, self.theta)
        if cache is not None:
            write = jax.lax.dynamic_update_slice_in_dim
            key, value = write(cache["key"], key, index, axis=1), write(cache["value"], value, index, axis=1)
            cache = {"key": key, "value": value}
        return self.out(attend(query, key, value, mask)), cache


class MLP(nnx.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        small = small_init(config.d_model)
        model, hidden = {"embed": config.d_model}, {"mlp": config.d_ff}
        self.gate = Projection(model, hidden, init=small, rngs=rngs)
        self.up = Projection(model, hidden, init=small, rngs=rngs)
        self.down = Projection(hidden, model, init=residual_init(config.layers, config.d_model), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """One pre-norm layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        norm = {"kind": config.norm, "epsilon": config.norm_epsilon}
        self.attention_norm = Norm(config.d_model, "embed", **norm)
        self.attention = Attention(config, rngs)
        self.mlp_norm = Norm(config.d_model, "embed", **norm)
        self.mlp = MLP(config, rngs)

    def __call__(self, x, positions, mask, cache, index):
        update, cache = self.attention(self.attention_norm(x), positions, mask, cache, index)
        x = x + update
        return x + self.mlp(self.mlp_norm(x)), cache

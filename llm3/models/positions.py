"""Rotary angles, and what differs between layers. Shapes: B batch, T length, h head_dim."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llm3.config.model_schema import ModelConfig, RopeScaling

Angles = tuple[jax.Array, jax.Array]


def rotation(positions: jax.Array, size: int, theta: float, scaling: RopeScaling | None = None) -> Angles:
    """Sine and cosine of the rotary angles (Su et al. 2021, section 3.4): float32 [B, T, 1, size / 2] each."""
    half = size // 2
    turns = positions[..., None, None].astype(jnp.float32)
    angles = turns * scaled(theta ** (-jnp.arange(half, dtype=jnp.float32) / half), scaling)
    # without the barrier, XLA fuses them into every use and recomputes them for every head of every layer
    return jax.lax.optimization_barrier((jnp.sin(angles), jnp.cos(angles)))


def scaled(frequencies: jax.Array, scaling: RopeScaling | None) -> jax.Array:
    """Rotary frequencies, float32 [half], stretched for longer windows.

    linear: all divided by the factor (Chen et al. 2023, "Extending Context Window of Large Language Models via
    Positional Interpolation", section 2.3). llama3: divided by the factor where fewer than low_freq_factor periods fit
    into the original window, unchanged where more than high_freq_factor do, interpolated between (Llama 3.1's reference
    code, `apply_scaling`; a form of "NTK-by-parts", Peng et al. 2023, YaRN, section 3.2).
    """
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    periods = scaling.original_max_positions * frequencies / (2 * math.pi)
    kept = jnp.clip((periods - low) / (high - low), 0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def rotate(x: jax.Array, sine: jax.Array, cosine: jax.Array, interleaved: bool = False) -> jax.Array:
    """x [B, T, heads, h] rotated by the angles of `rotation`; channels beyond those of the angles stay as they are.

    Channel i rotates with channel i + half; interleaved: 2i with 2i + 1 (Su et al. 2021, equation 34).
    """
    size = 2 * sine.shape[-1]
    turned, rest = (x, None) if size == x.shape[-1] else (x[..., :size], x[..., size:])
    turned = turned.astype(jnp.float32)
    first, second = (turned[..., ::2], turned[..., 1::2]) if interleaved else jnp.split(turned, 2, axis=-1)
    pair = [first * cosine - second * sine, second * cosine + first * sine]
    rotated = jnp.stack(pair, axis=-1).reshape(turned.shape) if interleaved else jnp.concatenate(pair, axis=-1)
    rotated = rotated.astype(x.dtype)
    return rotated if rest is None else jnp.concatenate([rotated, rest], axis=-1)


class PerLayer(NamedTuple):
    """A value for each layer, out of a few: layer i uses variants[kinds[i]]."""

    variants: tuple[Any, ...]
    kinds: tuple[int, ...]

    def at(self, layer: jax.Array | int, first: int, stop: int) -> Any:
        """The value for a layer, traced or not, of the layers first to stop; computes nothing if these have one kind.

        The variants of several kinds must be trees of arrays of the same shapes.
        """
        used, index = self._used(layer, first, stop)
        if index is None:
            return used[0]
        return jax.tree.map(lambda *each: jax.lax.select_n(index, *each), *used)

    def apply(self, layer: jax.Array | int, first: int, stop: int, function: Callable[[Any], Any]) -> Any:
        """function(the value for a layer), as of `at`; of several kinds, each is compiled, and one is computed."""
        used, index = self._used(layer, first, stop)
        if index is None:
            return function(used[0])
        return jax.lax.switch(index, [partial(function, each) for each in used])

    def _used(self, layer: jax.Array | int, first: int, stop: int) -> tuple[list[Any], jax.Array | None]:
        """The values of the layers first to stop, and which of them a layer has; None: the first."""
        if isinstance(layer, int):
            return [self.variants[self.kinds[layer]]], None
        used = sorted(set(self.kinds[first:stop]))
        index = jnp.asarray([used.index(kind) for kind in self.kinds[first:stop]])[layer - first]
        return [self.variants[kind] for kind in used], index if len(used) > 1 else None


def has_window(config: ModelConfig, layer: int) -> bool:
    """Whether a layer attends within `window` only."""
    return config.window > 0 and layer not in config.full_attention_layers


def angles(config: ModelConfig, positions: jax.Array) -> PerLayer:
    """The rotary angles of each layer; None for layers of a model without rotary positions."""
    if config.positions != "rope":
        return PerLayer((None,), (0,) * config.layers)

    def kind(layer: int) -> tuple[float, RopeScaling | None]:
        if layer in config.no_rope_layers:
            return 0.0, None
        if config.window_rope_theta and has_window(config, layer):
            return config.window_rope_theta, None
        return config.rope_theta, config.rope_scaling

    def variant(theta: float, scaling: RopeScaling | None) -> Angles:
        if theta:
            return rotation(positions, config.rotary_dim, theta, scaling)
        shape = (*positions.shape, 1, config.rotary_dim // 2)  # no rotation: angles of 0
        return jnp.zeros(shape), jnp.ones(shape)

    chosen = [kind(layer) for layer in range(config.layers)]
    kinds = list(dict.fromkeys(chosen))
    return PerLayer(tuple(variant(*each) for each in kinds), tuple(kinds.index(each) for each in chosen))

"""AdamW's moments in 16 or 8 bits: the update rule computes in float32, and its state is stored in fewer bits.

8 bits are floats with 3 bits after the leading one, relative to the largest magnitude of a block along the last axis:
block-wise quantisation with a dynamic exponent (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization",
sections 2.1 and 2.2), by arithmetic instead of a table. The first moment has a sign and 16 octaves below the largest,
the second has 32: its square root divides, so what is not 0 never becomes 0 (Li et al. 2023, "Memory Efficient
Optimizers with 4-bit States", section 4.1).

Moments are rounded up or down at random, so that they are right on average (Gupta et al. 2015, "Deep Learning with
Limited Numerical Precision", section 3.1). Rounded to the nearest, a mean that moves by a thousandth of its distance
per update (b2 = 0.999) would not move at all. The random bits follow from the leaf, the layer and the count of updates.
"""

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llm3.models.quantized import block_size
from llm3.segments import locate
from llm3.tree import flatten, unflatten

# Last path components of leaves whose moments are stored in fewer bits. Those of others are small.
LARGE = ("kernel", "embedding", "a", "b")
LEAST_BLOCK = 16  # leaves whose last axis has no longer blocks keep float32: scales would need the bytes saved
BITS = 3  # after the leading one of a stored number
SHIFT = 23 - BITS  # bits of float32 that are dropped
ONE = 127 << BITS  # 1.0 as float32, without the dropped bits
LEVELS = {True: 127, False: 255}  # by whether there is a sign: codes of a magnitude above 0


class Blocks(NamedTuple):
    """A moment of the trainable tree in 8 bits.

    codes: uint8, the leaves in the shapes of their parameters. scales: float32, the same leaves with one entry a block
    along the last axis. rest: the other leaves, float32.
    """

    codes: dict
    scales: dict
    rest: dict


def low_moments(rule: optax.GradientTransformation, kind: str) -> optax.GradientTransformation:
    """The rule of `optax.adam` with its moments stored as `kind`: bfloat16 or float8.

    An update is computed in float32 from the stored moments and the gradients, before the new moments are rounded.
    """

    def each(state: Any, function: Any) -> Any:
        is_adam = lambda node: isinstance(node, optax.ScaleByAdamState)  # noqa: E731
        return jax.tree.map(lambda node: function(node) if is_adam(node) else node, state, is_leaf=is_adam)

    def store(state: Any) -> Any:
        return each(state, lambda adam: _stored_state(adam, kind))

    def init(params: dict) -> Any:
        return store(rule.init(params))

    def update(gradients: dict, state: Any, params: dict | None = None) -> tuple[dict, Any]:
        updates, new = rule.update(gradients, each(state, _restored_state), params)
        return updates, store(new)

    return optax.GradientTransformation(init, update)


def _stored_state(adam: optax.ScaleByAdamState, kind: str) -> optax.ScaleByAdamState:
    first, second = flatten(adam.mu), flatten(adam.nu)
    random = {path: _random_bits(path, x.shape, adam.count) for path, x in first.items() if _is_low(path, x, kind)}
    mu = _stored(first, kind, {path: bits & 0xFFFF for path, bits in random.items()}, signed=True)
    nu = _stored(second, kind, {path: bits >> 16 for path, bits in random.items()}, signed=False)
    return optax.ScaleByAdamState(adam.count, mu, nu)


def _restored_state(adam: optax.ScaleByAdamState) -> optax.ScaleByAdamState:
    return optax.ScaleByAdamState(adam.count, _restored(adam.mu, signed=True), _restored(adam.nu, signed=False))


def _is_low(path: str, leaf: jax.Array, kind: str) -> bool:
    large = path.split("/")[-1] in LARGE
    return large and (kind == "bfloat16" or block_size(leaf.shape[-1]) >= LEAST_BLOCK)


def _stored(values: dict[str, jax.Array], kind: str, random: dict[str, jax.Array], signed: bool) -> Any:
    """A moment {path: float32} as `kind`. random: 16 random bits for each number of the leaves to store."""
    if kind == "bfloat16":
        rounded = {path: _to_bfloat16(values[path], bits) for path, bits in random.items()}
        return unflatten(values | rounded)
    found = {path: _to_codes(values[path], bits, signed) for path, bits in random.items()}
    codes, scales = ({path: pair[index] for path, pair in found.items()} for index in (0, 1))
    rest = {path: leaf for path, leaf in values.items() if path not in random}
    return Blocks(unflatten(codes), unflatten(scales), unflatten(rest))


def _restored(stored: Any, signed: bool) -> dict:
    """A moment as a tree of float32."""
    if not isinstance(stored, Blocks):
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), stored)
    scales = flatten(stored.scales)
    values = {path: _from_codes(codes, scales[path], signed) for path, codes in flatten(stored.codes).items()}
    return unflatten(flatten(stored.rest) | values)


def _random_bits(path: str, shape: tuple[int, ...], count: jax.Array) -> jax.Array:
    """uint32 of a leaf's shape; those of a layer do not depend on how the stack is cut into segments."""
    canonical, layers = locate(path)
    key = jax.random.fold_in(jax.random.key(zlib.crc32(canonical.encode()), impl="threefry2x32"), count)
    if layers is None:
        return jax.random.bits(key, shape, jnp.uint32)
    keys = jax.vmap(lambda layer: jax.random.fold_in(key, layer))(jnp.asarray(layers))
    return jax.vmap(lambda each: jax.random.bits(each, shape[1:], jnp.uint32))(keys)


def _to_bfloat16(values: jax.Array, random: jax.Array) -> jax.Array:
    raw = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.uint32) + random
    return jax.lax.bitcast_convert_type((raw >> 16).astype(jnp.uint16), jnp.bfloat16)


def _to_codes(values: jax.Array, random: jax.Array, signed: bool) -> tuple[jax.Array, jax.Array]:
    """(codes, scales) of float32 values; codes are as ordered as the magnitudes, and 0 is 0."""
    blocks = values.reshape(*values.shape[:-1], -1, block_size(values.shape[-1]))
    scales = jnp.abs(blocks).max(axis=-1)
    unit = (jnp.abs(blocks) / jnp.where(scales > 0, scales, 1)[..., None]).reshape(values.shape)
    raw = jax.lax.bitcast_convert_type(unit, jnp.uint32) + (random << (SHIFT - 16))
    levels = LEVELS[signed]
    least = 0 if signed else (unit > 0).astype(jnp.int32)
    codes = jnp.clip((raw >> SHIFT).astype(jnp.int32) - (ONE - levels), least, levels).astype(jnp.uint8)
    return codes | (jnp.signbit(values).astype(jnp.uint8) << 7) if signed else codes, scales


def _from_codes(codes: jax.Array, scales: jax.Array, signed: bool) -> jax.Array:
    levels = LEVELS[signed]
    magnitudes = (codes & levels).astype(jnp.uint32)
    units = jax.lax.bitcast_convert_type((magnitudes + (ONE - levels)) << SHIFT, jnp.float32)
    units = jnp.where(magnitudes > 0, units, 0)
    units = jnp.where(codes > levels, -units, units)
    return (units.reshape(*scales.shape, -1) * scales[..., None]).reshape(codes.shape)

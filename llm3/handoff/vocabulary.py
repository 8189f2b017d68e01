"""Adding tokens to a trained model: the leaves with one entry per token, and how they are extended.

A new token starts at the mean of the old tokens, which nearly preserves their probabilities (Hewitt 2021, "Initializing
New Word Embeddings for Pretrained Language Models").
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

VOCABULARY_AXES = {"embed/embedding": 0, "lm_head/kernel": 1, "lm_head/bias": 0}  # {path: axis}


def resizes(path: str, before: tuple[int, ...], after: tuple[int, ...], added: int, tokens: int = 0) -> bool:
    """Whether `added` new tokens or another padding, and nothing else, turn shape `before` into shape `after`.

    tokens: the size of the vocabulary afterwards, of which `vocab_multiple` may make a larger axis; 0: the axis of
    `after`. New tokens that fit into the old padding change a leaf, but not its shape.
    """
    axis = VOCABULARY_AXES.get(path)
    if axis is None or len(before) != len(after):
        return False
    others = [size for i, size in enumerate(before) if i != axis] == [size for i, size in enumerate(after) if i != axis]
    if not tokens:
        return bool(added) and others and after[axis] == before[axis] + added
    fits = before[axis] >= tokens - added and after[axis] >= tokens
    return others and fits and (added > 0 or before[axis] != after[axis])


def before_extension(path: str, leaf: Any, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """The parent's shape and dtype, sharded as `leaf` except along the vocabulary: the mesh may not divide it."""
    sharding = leaf.sharding
    if isinstance(sharding, NamedSharding):
        names = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
        names[VOCABULARY_AXES[path]] = None
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*names))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def extended(path: str, leaf: jax.Array, like: Any, added: int, tokens: int = 0) -> jax.Array:
    """`leaf` with `added` new tokens, in the shape, dtype and sharding of `like`; tokens: as in `resizes`.

    New tokens are the float32 mean of the old ones; rows that only fill `vocab_multiple` are 0.
    """
    axis = VOCABULARY_AXES[path]
    tokens = tokens or like.shape[axis]

    def extend(leaf: jax.Array) -> jax.Array:
        old = jax.lax.slice_in_dim(leaf, 0, tokens - added, axis=axis)
        mean = old.astype(jnp.float32).mean(axis, keepdims=True)
        parts = [old.astype(like.dtype), jnp.repeat(mean.astype(like.dtype), added, axis)]
        joined = jnp.concatenate(parts, axis)
        fill = [(0, (like.shape[axis] - tokens) * (i == axis)) for i in range(joined.ndim)]
        return jnp.pad(joined, fill)

    return jax.jit(extend, out_shardings=like.sharding)(leaf)

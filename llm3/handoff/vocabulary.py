"""Adding tokens to a trained model: the leaves with one row or column per token, and how they are extended.

A new token starts at the mean of the old tokens, which nearly preserves their probabilities (Hewitt 2021, "Initializing
New Word Embeddings for Pretrained Language Models").
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

VOCABULARY_AXES = {"embed/embedding": 0, "lm_head/kernel": 1}  # {path: axis}


def grows(path: str, before: tuple[int, ...], after: tuple[int, ...], added: int) -> bool:
    """Whether `added` > 0 new tokens, and nothing else, turn a leaf of shape `before` into shape `after`."""
    axis = VOCABULARY_AXES.get(path)
    if axis is None or not added:
        return False
    return tuple(after) == tuple(size + added * (index == axis) for index, size in enumerate(before))


def before_extension(path: str, leaf: Any, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """The parent's shape and dtype, sharded as `leaf` except along the vocabulary: the mesh may not divide it."""
    sharding = leaf.sharding
    if isinstance(sharding, NamedSharding):
        names = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
        names[VOCABULARY_AXES[path]] = None
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*names))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def extended(path: str, leaf: jax.Array, like: Any) -> jax.Array:
    """`leaf` extended to the shape, dtype and sharding of `like`: new tokens are the float32 mean of the old ones."""
    axis = VOCABULARY_AXES[path]
    added = like.shape[axis] - leaf.shape[axis]

    def extend(old: jax.Array) -> jax.Array:
        mean = old.astype(jnp.float32).mean(axis, keepdims=True)
        return jnp.concatenate([old.astype(like.dtype), jnp.repeat(mean.astype(like.dtype), added, axis)], axis)

    return jax.jit(extend, out_shardings=like.sharding)(leaf)

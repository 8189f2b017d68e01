"""New tokens in a trained model: the leaves that have a row or column for each token, and how these grow.

A new token starts at the mean of the old ones, which keeps the old ones' probabilities nearly as they were (Hewitt
2021, "Initializing New Word Embeddings for Pretrained Language Models").
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

VOCABULARY_AXES = {"embed/embedding": 0, "lm_head/kernel": 1}  # by leaf


def grows(path: str, before: tuple[int, ...], after: tuple[int, ...], added: int) -> bool:
    """Whether a leaf of shape `before` becomes one of shape `after` by `added` > 0 new tokens, and by nothing else."""
    axis = VOCABULARY_AXES.get(path)
    if axis is None or not added:
        return False
    return tuple(after) == tuple(size + added * (place == axis) for place, size in enumerate(before))


def shrunk(path: str, leaf: Any, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """`leaf` in its older shape and dtype, its vocabulary axis in one piece: no mesh need divide the older size."""
    sharding = leaf.sharding
    if isinstance(sharding, NamedSharding):
        names = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
        names[VOCABULARY_AXES[path]] = None
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*names))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def grown(path: str, leaf: jax.Array, like: Any) -> jax.Array:
    """`leaf` in the shape, dtype and sharding of `like`: the old tokens as they are, the new ones their mean.

    The mean is taken in float32.
    """
    axis = VOCABULARY_AXES[path]
    added = like.shape[axis] - leaf.shape[axis]

    def extend(old: jax.Array) -> jax.Array:
        mean = old.astype(jnp.float32).mean(axis, keepdims=True)
        return jnp.concatenate([old.astype(like.dtype), jnp.repeat(mean.astype(like.dtype), added, axis)], axis)

    return jax.jit(extend, out_shardings=like.sharding)(leaf)

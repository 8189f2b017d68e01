"""Another vocabulary than the parent's: the leaves with one row or column per token, and how they are changed.

A new token starts at the mean of the old tokens, which nearly preserves their probabilities (Hewitt 2021, "Initializing
New Word Embeddings for Pretrained Language Models"). The rows of a pretrained model may outnumber its tokens: its spare
rows are kept, and a new token takes the first of them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

VOCABULARY_AXES = {"embed/embedding": 0, "lm_head/kernel": 1, "lm_head/bias": 0}  # {path: axis}


class VocabularyChange(NamedTuple):
    """The change between the vocabularies of a parent and of a model; the default is none."""

    known: int = 0  # tokens of the parent's tokenizer
    added: int = 0  # tokens that this run adds after them
    rows: int = 0  # rows of the parent's leaves without padding; 0: all of them
    multiple: int = 1  # the model pads its rows to a multiple of this

    def size(self, before: int) -> int:
        """The number of rows in the model, without padding, if the parent has `before` rows."""
        return max(self.rows or before, self.known + self.added if self.added else 0)

    def shape(self, path: str, before: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in the model of a leaf of shape `before` in the parent."""
        axis = VOCABULARY_AXES.get(path)
        if axis is None:
            return tuple(before)
        size = -(-self.size(before[axis]) // self.multiple) * self.multiple
        return (*before[:axis], size, *before[axis + 1 :])


NO_CHANGE = VocabularyChange()


def before_change(path: str, leaf: Any, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """The parent's shape and dtype, sharded as `leaf` except along the vocabulary: the mesh may not divide it."""
    sharding = leaf.sharding
    if isinstance(sharding, NamedSharding):
        names = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
        names[VOCABULARY_AXES[path]] = None
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*names))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def changed(path: str, leaf: jax.Array, like: Any, change: VocabularyChange) -> jax.Array:
    """`leaf` in the shape, dtype and sharding of `like`.

    New tokens are the float32 mean of the old ones, padding is zero, and spare rows are kept.
    """
    axis, known = VOCABULARY_AXES[path], change.known
    rows = change.rows or leaf.shape[axis]
    size = change.size(rows)

    def resize(old: jax.Array) -> jax.Array:
        cut = lambda start, stop: jax.lax.slice_in_dim(old, start, stop, axis=axis).astype(like.dtype)  # noqa: E731
        parts = [cut(0, rows)]
        if change.added:
            tokens = jax.lax.slice_in_dim(old, 0, known, axis=axis).astype(jnp.float32)
            mean = tokens.mean(axis, keepdims=True).astype(like.dtype)
            parts = [cut(0, known), jnp.repeat(mean, change.added, axis), cut(min(known + change.added, rows), rows)]
        padding = [(0, (like.shape[axis] - size) * (each == axis)) for each in range(old.ndim)]
        return jnp.pad(jnp.concatenate(parts, axis), padding)

    return jax.jit(resize, out_shardings=like.sharding)(leaf)

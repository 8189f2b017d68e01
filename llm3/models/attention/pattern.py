"""Which keys each query may attend to, as one mask or by blocks. Shapes: B batch, T queries, S keys."""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llm3.models.layers import at_positions

Range = tuple[jax.Array, jax.Array]  # the least and the greatest of each block

LAST = 2**30  # above the number of any document


class Places(NamedTuple):
    """Where tokens are: the position in the document and the number of the document, int32 [B, T] each."""

    positions: jax.Array
    segments: jax.Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["queries", "keys", "prefix"],
    meta_fields=["causal", "window", "in_order"],
)
@dataclasses.dataclass(frozen=True)
class Pattern:
    """Which keys each query may attend to: those of its document and, if causal, at no later position.

    prefix: bool [B, S], keys to which all queries of their document may attend; None: no such keys. window: of a causal
    model, the distance between a query and a key is less than this (Jiang et al. 2023, Mistral 7B, section 2); of a
    bidirectional one, at most window // 2 (Beltagy et al. 2020, Longformer, section 3.1). 0: any distance. in_order:
    the queries are the keys, and positions rise by one along each document.
    """

    queries: Places
    keys: Places
    prefix: jax.Array | None
    causal: bool
    window: int
    in_order: bool

    @property
    def skips_later_keys(self) -> bool:
        """Whether no query attends to a key with a higher index."""
        return self.in_order and self.causal and self.prefix is None

    def taken(self, positions: jax.Array | None) -> "Pattern":
        """The pattern of the queries at these places, int32 [B, N], only; None: of all."""
        if positions is None:
            return self
        queries = Places(*(at_positions(each, positions, 1) for each in self.queries))
        return dataclasses.replace(self, queries=queries, in_order=False)

    def mask(self) -> jax.Array:
        """bool [B, T, S]: True where a query may attend to a key."""
        (positions, segments), (key_positions, key_segments) = self.queries, self.keys
        mask = segments[:, :, None] == key_segments[:, None, :]
        if self.causal:
            not_later = positions[:, :, None] >= key_positions[:, None, :]
            mask &= not_later if self.prefix is None else not_later | self.prefix[:, None, :]
        if self.window:
            distance = jnp.abs(positions[:, :, None] - key_positions[:, None, :])
            mask &= distance < self.window if self.causal else distance <= self.window // 2
        return mask

    def key_bounds(self) -> tuple[jax.Array, jax.Array]:
        """The first key of each query and one after its last, int32 [B, T] each, if in order and without a prefix."""
        (positions, segments), index = self.queries, jnp.arange(self.queries.positions.shape[1])
        start = index - positions
        ends = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (0, 1)), constant_values=True)
        end = jax.lax.cummin(jnp.where(ends, index + 1, LAST), axis=1, reverse=True)
        if self.causal:
            near = index - self.window + 1 if self.window else start
            return jnp.maximum(start, near), jnp.broadcast_to(index + 1, start.shape)
        if self.window:
            reach = self.window // 2
            return jnp.maximum(start, index - reach), jnp.minimum(end, index + reach + 1)
        return start, end

    def block(self, first_query: jax.Array, queries: int, first_key: jax.Array, keys: int) -> "Pattern":
        """The pattern of a block of queries and a block of keys, which begin there and are so many."""
        at_queries = partial(jax.lax.dynamic_slice_in_dim, start_index=first_query, slice_size=queries, axis=1)
        at_keys = partial(jax.lax.dynamic_slice_in_dim, start_index=first_key, slice_size=keys, axis=1)
        return dataclasses.replace(
            self,
            queries=Places(*map(at_queries, self.queries)),
            keys=Places(*map(at_keys, self.keys)),
            prefix=None if self.prefix is None else at_keys(self.prefix),
        )

    def padded(self, queries: int, keys: int) -> "Pattern":
        """The pattern with more queries and keys, which nobody attends to and which attend to nothing."""
        more_queries, more_keys = (((0, 0), (0, count)) for count in (queries, keys))
        return dataclasses.replace(
            self,
            queries=Places(
                jnp.pad(self.queries.positions, more_queries),
                jnp.pad(self.queries.segments, more_queries, constant_values=LAST + 1),
            ),
            keys=Places(
                jnp.pad(self.keys.positions, more_keys),
                jnp.pad(self.keys.segments, more_keys, constant_values=LAST + 2),
            ),
            prefix=None if self.prefix is None else jnp.pad(self.prefix, more_keys),
        )

    def blocks_that_meet(self, queries: int, keys: int) -> jax.Array:
        """bool [T / queries, S / keys]: False where no query of the block may attend to a key of the block, in any row.

        Documents and positions are compared by their least and greatest in a block, so that this is linear in T and S.
        """

        def ranges(x: jax.Array, size: int) -> Range:
            blocks = x.reshape(x.shape[0], -1, size)
            return blocks.min(-1), blocks.max(-1)

        def overlap(a: Range, b: Range, distance: int = 0) -> jax.Array:
            (low, high), (key_low, key_high) = a, b
            return (low[:, :, None] - distance <= key_high[:, None]) & (key_low[:, None] <= high[:, :, None] + distance)

        # documents are numbered in their order, and padding, which is 0, comes after them
        segments = [jnp.where(each.segments == 0, LAST, each.segments) for each in (self.queries, self.keys)]
        meet = overlap(ranges(segments[0], queries), ranges(segments[1], keys))
        if self.in_order:  # then positions differ as indices do, within a document
            length = self.queries.positions.shape[1]
            places, key_places = (ranges(jnp.arange(length)[None], size) for size in (queries, keys))
            (_, last), (key_first, _) = places, key_places
            if self.skips_later_keys:
                meet &= key_first[:, None] <= last[:, :, None]
            if self.window:
                meet &= overlap(places, key_places, self.window - 1 if self.causal else self.window // 2)
        return meet.any(0)

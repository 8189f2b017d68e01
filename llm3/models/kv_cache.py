"""The key-value cache: the keys and values of the tokens that each row of a batch has read, written in place.

Shapes: B rows, T new tokens, S slots, K kv heads, h head_dim, N layers that share a buffer.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from llm3.config.model_schema import ModelConfig
from llm3.distributed.sharding import constrain
from llm3.models.positions import has_window
from llm3.segments import Segments, segment_name

Buffers = tuple[jax.Array, jax.Array]  # of keys and of values


class Cache(NamedTuple):
    """lengths: int32 [B], the tokens that each row has read. buffers: {segment: for each layer of a period}.

    The layers of a segment repeat with a `period`. Layer i of each period has its own buffers of keys and of values,
    [N, B, K, S, h], with one entry for each period. A row's position p is in slot p % S.
    """

    lengths: jax.Array
    buffers: dict[str, tuple[Buffers, ...]]


def make_cache(config: ModelConfig, segments: Segments, rows: int, capacity: int, chunk: int = 1) -> Cache:
    """An empty cache of a model cut into `segments`, for at most `capacity` tokens a row.

    chunk: the most tokens that are read at a time after the first ones. A layer with a window keeps the keys that these
    can attend to, window - 1 + chunk, in a ring.
    """

    def buffer(layer: int, count: int) -> jax.Array:
        slots = min(capacity, config.window - 1 + chunk) if has_window(config, layer) else capacity
        zeros = jnp.zeros((count, rows, config.kv_heads, slots, config.head_dim), config.compute_dtype)
        return constrain(zeros, None, "batch", "kv_heads", "keys", "head_dim")

    buffers = {}
    for first, stop in segments:
        size = period(config, first, stop)
        layers = range(first, first + size)
        buffers[segment_name(first, stop)] = tuple(
            (buffer(layer, (stop - first) // size), buffer(layer, (stop - first) // size)) for layer in layers
        )
    return Cache(jnp.zeros(rows, jnp.int32), buffers)


def period(config: ModelConfig, first: int, stop: int) -> int:
    """The number of layers after which layers with and without a window repeat, from `first` to `stop`."""
    kinds = [has_window(config, layer) for layer in range(first, stop)]
    sizes = (size for size in range(1, len(kinds) + 1) if len(kinds) % size == 0)
    return next(size for size in sizes if kinds == kinds[:size] * (len(kinds) // size))


def slot_positions(lengths: jax.Array, slots: int) -> jax.Array:
    """The position in each slot of rows that have read `lengths` tokens, int32 [B, S]; below 0: an empty slot."""
    last = lengths[:, None] - 1
    return last - (last - jnp.arange(slots)) % slots


class LayerCache(NamedTuple):
    """The cache of one layer while it reads new tokens.

    buffers: [N, B, K, S, h] each; this layer's entry is `number`. lengths: int32 [B], with the new tokens. positions:
    int32 [B, T], of the new tokens, below 0 where there is none; None: they are the first tokens of their rows.
    """

    buffers: Buffers
    number: jax.Array | int
    lengths: jax.Array
    positions: jax.Array | None

    def write(self, key: jax.Array, value: jax.Array) -> tuple[Buffers, jax.Array, jax.Array]:
        """The buffers with the new keys and values [B, T, K, h], and the keys and values that the tokens can attend to.

        These are [B, S, K, h] in the order of the slots, or the new ones if they are the first tokens.
        """
        if self.positions is None:
            return (self._filled(self.buffers[0], key), self._filled(self.buffers[1], value)), key, value
        written = self._added(self.buffers[0], key), self._added(self.buffers[1], value)
        return written, written[0][self.number].swapaxes(1, 2), written[1][self.number].swapaxes(1, 2)

    def _filled(self, buffer: jax.Array, new: jax.Array) -> jax.Array:
        """Tokens after the last one of a row may be written too: no later query attends to them."""
        new, slots = new.swapaxes(1, 2), buffer.shape[3]
        if new.shape[2] > slots:
            kept = jnp.maximum(slot_positions(self.lengths, slots), 0)
            new = jnp.take_along_axis(new, kept[:, None, :, None], axis=2)
        return jax.lax.dynamic_update_slice(buffer, new[None], (self.number, 0, 0, 0, 0))

    def _added(self, buffer: jax.Array, new: jax.Array) -> jax.Array:
        """Indexed in the order of the axes, which needs no transposed copy; unsigned, which needs no wrapped ones."""
        assert self.positions is not None
        _, batch, heads, slots, _ = buffer.shape
        length = self.positions.shape[1]
        outside = slots + jnp.arange(length)  # dropped
        at = jnp.where(self.positions < 0, outside, self.positions % slots)
        rows, kv = jnp.arange(batch)[:, None, None], jnp.arange(heads)[:, None]
        index = (jnp.asarray(each, jnp.uint32) for each in (self.number, rows, kv, at[:, None]))
        return buffer.at[tuple(index)].set(new.swapaxes(1, 2), mode="drop", unique_indices=True)

"""A causal transformer that reads the tokens of each row a few at a time, with a key-value cache."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from llm3.distributed.sharding import constrain, gathered, residual, scattered
from llm3.models.attention.layer import LayerInputs
from llm3.models.attention.of_layers import Attend, held, layer_attention
from llm3.models.attention.pattern import Pattern, Places
from llm3.models.blocks import Block
from llm3.models.kv_cache import Buffers, Cache, LayerCache, slot_positions
from llm3.models.positions import angles, has_window
from llm3.models.transformer import Transformer
from llm3.segments import segment_bounds

# reads(layer, number of its entry in the buffers, a layer with the same window, the buffers) -> what the layer reads
Reads = Callable[[jax.Array | int, jax.Array | int, int, Buffers], LayerInputs]


def read(
    model: Transformer, tokens: jax.Array, counts: jax.Array, cache: Cache, *, first: bool = False
) -> tuple[jax.Array, Cache]:
    """Hidden states [B, T, D] of the next tokens of each row, after the last norm, and the cache with these tokens.

    tokens: int32 [B, T], of which the first counts [b], int32 [B], belong to row b; the hidden states of others are
    undefined. first: they are the first tokens of their rows, and attend to one another only. Else T is at most the
    `chunk` for which the cache was made.
    """
    config, steps = model.config, jnp.arange(tokens.shape[1])
    real, lengths = steps < counts[:, None], cache.lengths + counts
    positions = jnp.where(real, cache.lengths[:, None] + steps, 0)
    rotary = angles(config, positions)

    def kind(layer: int, buffers: Buffers) -> tuple[int, int]:
        return config.window * has_window(config, layer), buffers[1].shape[3]

    def attention(window: int, slots: int) -> Attend:
        keys = slot_positions(lengths, slots)
        filled = Places(positions, jnp.ones_like(positions)), Places(keys, (keys >= 0).astype(jnp.int32))
        mask = Pattern(*filled, None, True, window, False).mask()[:, None]
        return held(config, constrain(mask, "batch", None, "length", "keys"), in_order=False)

    parts = [(segment_bounds(name)[0], own) for name, own in cache.buffers.items()]
    kinds = {kind(start + i, own[i]) for start, own in parts for i in range(len(own))}
    new = Places(positions, real.astype(jnp.int32))
    among_new = layer_attention(config, new, new, None, in_order=True)
    to_all = {} if first else {each: attention(*each) for each in kinds}

    def reads(layer: jax.Array | int, number: jax.Array | int, like: int, buffers: Buffers) -> LayerInputs:
        own = LayerCache(buffers, number, lengths, None if first else jnp.where(real, positions, -1))
        attend = among_new.of(like, 0, config.layers) if first else to_all[kind(like, buffers)]
        skip_norm = layer == 0 if config.skip_first_norm else None
        return LayerInputs(rotary.at(layer, 0, config.layers), attend, own, None, None, skip_norm)

    x = residual(scattered(model.embed(tokens, positions)))
    written = {}
    for name, stack in model.layers.items():
        x, written[name] = _through(stack, segment_bounds(name)[0], x, cache.buffers[name], reads, config.scan_unroll)
    return gathered(x if model.final_norm is None else model.final_norm(x), None), Cache(lengths, written)


def _through(
    stack: Block, first: int, x: jax.Array, buffers: tuple[Buffers, ...], reads: Reads, unroll: int
) -> tuple[jax.Array, tuple[Buffers, ...]]:
    """Apply the layers of a segment, of which the lowest is layer `first`.

    The buffers are carried from layer to layer: as inputs and outputs of the scan, they would be copied.
    """
    graph, params = nnx.split(stack)
    size = len(buffers)
    periods = jax.tree.map(lambda leaf: leaf.reshape(-1, size, *leaf.shape[1:]), params)
    count = jax.tree.leaves(periods)[0].shape[0]

    def body(state: tuple, part: tuple) -> tuple[tuple, None]:
        (x, buffers), (layers, number) = state, part
        written = []
        for place, own in enumerate(buffers):
            layer = nnx.merge(graph, jax.tree.map(lambda leaf, place=place: leaf[place], layers))
            x, own = layer(x, reads(first + number * size + place, number, first + place, own))
            x = residual(x)
            written.append(own)
        return (x, tuple(written)), None

    if count == 1:  # with a constant number, a layer reads its buffers without a slice of them
        return body((x, buffers), (jax.tree.map(lambda leaf: leaf[0], periods), 0))[0]
    return jax.lax.scan(body, (x, buffers), (periods, jnp.arange(count)), unroll=min(unroll, count))[0]

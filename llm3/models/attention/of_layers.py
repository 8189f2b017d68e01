"""The attention of each layer of a pass, by the implementation that is chosen for it."""

import dataclasses
import importlib
from collections.abc import Callable
from functools import partial

import jax

from llm3.config.model_schema import ModelConfig
from llm3.distributed.sharding import constrain, is_cut
from llm3.models.attention import plain
from llm3.models.attention.choice import IMPLEMENTATIONS, Call, choose, explained, platform
from llm3.models.attention.pattern import Pattern, Places
from llm3.models.attention.sharded import on_shards
from llm3.models.layers import at_positions
from llm3.models.positions import PerLayer, has_window

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class LayerAttention:
    """patterns: of each layer. masks: bool [B, 1, T, S] of each, which serve all layers, if all scores are held."""

    config: ModelConfig
    patterns: PerLayer
    masks: PerLayer | None

    def of(self, layer: jax.Array | int, first: int, stop: int, positions: jax.Array | None = None) -> Attend:
        """The attention of a layer, traced or not, of the layers first to stop.

        It takes queries [B, T, H, h], keys and values [B, S, K, h], and returns [B, T, H, h]. positions: int32 [B, N],
        the places of the N queries that are taken; None: all T.
        """
        if self.masks is not None:
            mask = at_positions(self.masks.at(layer, first, stop), positions, 2)
            pattern = self.patterns.variants[self.patterns.kinds[first]]
            return held(self.config, mask, pattern.skips_later_keys and positions is None)
        return lambda query, key, value: self.patterns.apply(
            layer, first, stop, lambda pattern: self._chosen(query, key, value, pattern.taken(positions))
        )

    def _chosen(self, query: jax.Array, key: jax.Array, value: jax.Array, pattern: Pattern) -> jax.Array:
        scale, softcap = self.config.attention_scale, self.config.attention_softcap
        name = choose(_call(self.config, pattern, query.shape[1], key.shape[1]), self.config.attention)
        if name == "plain":
            return held(self.config, pattern.mask()[:, None], pattern.skips_later_keys)(query, key, value)
        module = importlib.import_module(f"llm3.models.attention.{IMPLEMENTATIONS[name].module}")
        return on_shards(partial(module.attend, scale=scale, softcap=softcap), query, key, value, pattern)


def held(config: ModelConfig, mask: jax.Array, in_order: bool) -> Attend:
    """Attention that holds all scores. mask and in_order: see `plain.attend`."""
    return lambda *arrays: plain.attend(*arrays, mask, in_order, config.attention_scale, config.attention_softcap)


def layer_attention(
    config: ModelConfig, queries: Places, keys: Places, prefix: jax.Array | None, in_order: bool
) -> LayerAttention:
    """The attention of a pass over these queries and keys; prefix and in_order as of `Pattern`."""
    kinds = tuple(int(has_window(config, layer)) for layer in range(config.layers))
    in_order = in_order and not is_cut("length")

    def pattern(kind: int) -> Pattern | None:
        window = config.window * kind
        return Pattern(queries, keys, prefix, config.causal, window, in_order) if kind in kinds else None

    patterns = PerLayer((pattern(0), pattern(1)), kinds)
    sizes = queries.positions.shape[1], keys.positions.shape[1]
    if {choose(_call(config, each, *sizes), config.attention) for each in patterns.variants if each} != {"plain"}:
        return LayerAttention(config, patterns, None)
    masks = [
        None if each is None else constrain(each.mask()[:, None], "batch", None, "length", "keys")
        for each in patterns.variants
    ]
    return LayerAttention(config, patterns, PerLayer(tuple(masks), kinds))


def calls_of(config: ModelConfig, length: int, of_platform: str, prefix: bool, cut: bool) -> dict[int, Call]:
    """The calls of all layers, by the window of a layer.

    prefix: whether the objective gives one. cut: whether the mesh cuts windows.
    """
    windows = sorted({config.window * has_window(config, layer) for layer in range(config.layers)})
    call = Call(
        platform=of_platform,
        queries=length,
        keys=length,
        causal=config.causal,
        prefix=prefix,
        window=0,
        softcap=config.attention_softcap,
        in_order=not cut,
        head_dim=config.head_dim,
        dtype=config.compute_dtype,
    )
    return {window: dataclasses.replace(call, window=window) for window in windows}


def attentions(calls: dict[int, Call], asked: str) -> set[str]:
    """The implementations that serve calls."""
    return {choose(each, asked) for each in calls.values()}


def attention_notes(calls: dict[int, Call], asked: str) -> list[str]:
    """What computes the attention of calls, and why."""
    found = {window: explained(call, asked) for window, call in calls.items()}
    if len(set(found.values())) == 1:
        return [f"attention: {next(iter(found.values()))}"]
    names = {window: f"with window {window}" if window else "without a window" for window in found}
    return [f"attention of layers {names[window]}: {what}" for window, what in found.items()]


def _call(config: ModelConfig, pattern: Pattern, queries: int, keys: int) -> Call:
    return Call(
        platform=platform(),
        queries=queries,
        keys=keys,
        causal=pattern.causal,
        prefix=pattern.prefix is not None,
        window=pattern.window,
        softcap=config.attention_softcap,
        in_order=pattern.in_order,
        head_dim=config.head_dim,
        dtype=config.compute_dtype,
    )

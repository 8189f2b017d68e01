"""The attention of a layer: its projections, and what it does between them.

Shapes: B batch, T length, S keys, D d_model, H heads, K kv heads, h head_dim.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
from flax import nnx

from llm3.config.model_schema import ModelConfig
from llm3.distributed.sharding import constrain, gathered
from llm3.models.attention.of_layers import Attend
from llm3.models.kv_cache import Buffers, LayerCache
from llm3.models.layers import Norm, Projection, adapters_of, at_positions, projection_key, residual_init, small_init
from llm3.models.positions import Angles, rotate


@dataclasses.dataclass(frozen=True)
class LayerInputs:
    """What a layer reads besides the hidden states.

    angles: see `rotation`; None: no rotary positions. attend: of queries, keys and values, see `LayerAttention.of`.
    cache: of this layer; None: the keys are those of the queries. random: a key for dropout. output_positions: int32
    [B, N], the positions of the result; None: all. skip_norm: bool scalar, whether attention reads x itself, not its
    norm; None: never.
    """

    angles: Angles | None
    attend: Attend
    cache: LayerCache | None
    random: jax.Array | None
    output_positions: jax.Array | None
    skip_norm: jax.Array | bool | None


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al. 2023), optionally with QK-norm and biases.

    QK-norm is over each head (Henry et al. 2020) or over all heads together (OLMo et al. 2024, OLMo 2, section 2.1).
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        c, small = config, small_init(config.d_model)
        heads, kv = {"heads": c.heads, "head_dim": c.head_dim}, {"kv_heads": c.kv_heads, "head_dim": c.head_dim}
        model = {"embed": c.d_model}

        def projection(name: str, inputs: dict, outputs: dict, init: Callable) -> Projection:
            bias = c.attention_bias == "all" or (c.attention_bias == "qkv" and name != "out")
            make = partial(Projection, bias=bias, adapters=adapters_of(c, name), matmul=c.matmul)
            return make(inputs, outputs, init=init, rngs=rngs)

        self.query = projection("query", model, heads, small)
        self.key = projection("key", model, kv, small)
        self.value = projection("value", model, kv, small)
        self.out = projection("out", heads, model, residual_init(c.layers, c.d_model))
        head, whole = {"head_dim": c.head_dim}, c.qk_norm == "projection"
        self.query_norm = Norm(c, heads if whole else head) if c.qk_norm != "none" else None
        self.key_norm = Norm(c, kv if whole else head) if c.qk_norm != "none" else None
        self.interleaved = c.rope_interleaved

    def __call__(self, x: jax.Array, inputs: LayerInputs) -> tuple[jax.Array, Buffers | None]:
        """x: [B, T, D]. Returns [B, T, D], or [B, N, D] with `output_positions`, and the buffers of the cache."""
        random, positions, buffers = inputs.random, inputs.output_positions, None
        query = self.query(at_positions(x, positions, 1), projection_key(random, "query"))
        key = self.key(x, projection_key(random, "key"))
        value = self.value(x, projection_key(random, "value"))
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if inputs.angles is not None:
            turned = partial(rotate, interleaved=self.interleaved)
            query = turned(query, *(at_positions(each, positions, 1) for each in inputs.angles))
            key = turned(key, *inputs.angles)
        query = gathered(query, "heads", "head_dim")
        key = constrain(key, "batch", "keys", "kv_heads", "head_dim")
        value = constrain(value, "batch", "keys", "kv_heads", "head_dim")
        if inputs.cache is not None:
            buffers, key, value = inputs.cache.write(key, value)
        y = gathered(inputs.attend(query, key, value), "heads", "head_dim")
        return self.out(y, projection_key(random, "out")), buffers

"""The input of the transformer: tokens and positions to embeddings."""

import jax
import jax.numpy as jnp
from flax import nnx

from llm3.config.model_schema import ModelConfig
from llm3.models.kernels import embed
from llm3.models.layers import Norm, small_init


class Embedding(nnx.Module):
    """Token embeddings, times `embedding_scale` (Mesnard et al. 2024, Gemma, reference code: sqrt(d_model)).

    Learned positions (Vaswani et al. 2017, section 3.5) and token types (Devlin et al. 2019, BERT, section 3) are added
    to them; all tokens are of type 0. The sum may be normalized, as in BERT's reference code.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        c, small = config, small_init(config.d_model)
        self.scale, self.offset, self.dtype = c.embedding_scale, c.position_offset, c.compute_dtype

        def table(rows: int, axis: str | None) -> nnx.Param:
            return nnx.Param(small(rngs.params(), (rows, c.d_model)), axes=(axis, "embed"))

        self.embedding = table(c.padded_vocab_size, "vocab")
        self.position = table(c.max_positions + c.position_offset, None) if c.positions == "learned" else None
        self.token_type = table(c.token_types, None) if c.token_types else None
        self.norm = Norm(c, {"embed": c.d_model}) if c.embedding_norm else None

    def __call__(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """tokens, positions: int32 [B, T]. Returns [B, T, D] in the compute dtype."""
        x = embed(self.embedding[...], tokens, self.dtype)
        if self.scale != 1:
            x = (x.astype(jnp.float32) * self.scale).astype(x.dtype)
        if self.position is not None:
            x = x + embed(self.position[...], positions + self.offset, self.dtype, None)
        if self.token_type is not None:  # in float32: the gradient is a sum over tokens
            x = (x.astype(jnp.float32) + self.token_type[...][0]).astype(x.dtype)
        return x if self.norm is None else self.norm(x)

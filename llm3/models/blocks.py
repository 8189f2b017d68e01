"""One layer of the transformer: attention, MLP, and where the norms are."""

import jax
import jax.numpy as jnp
from flax import nnx

from llm3.config.model_schema import ModelConfig
from llm3.distributed.sharding import gathered, scattered
from llm3.models.attention.layer import Attention, LayerInputs
from llm3.models.kv_cache import Buffers
from llm3.models.layers import MLP, Norm, at_positions


class Block(nnx.Module):
    """A layer: attention and MLP, each with a residual connection. `config.block` says where the norms are.

    - pre: x + f(norm(x)) for both parts (Xiong et al. 2020, section 3.2).
    - after: x + norm(f(x)) (OLMo et al. 2024, OLMo 2, section 2.1).
    - sandwich: x + out_norm(f(norm(x))) (Ding et al. 2021, CogView; Riviere et al. 2024, Gemma 2, section 2).
    - post: norm(x + f(x)) (Vaswani et al. 2017, section 3.1, as in BERT).
    - parallel: x + attention(norm1(x)) + mlp(norm2(x)) (Black et al. 2022, GPT-NeoX-20B, section 2.1).
    - parallel_one_norm: the same with one norm (Wang and Komatsuzaki 2021, GPT-J; Phi).
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        width = {"embed": config.d_model}
        self.form, sandwich = config.block, config.block == "sandwich"
        self.attention_norm = Norm(config, width)
        self.attention = Attention(config, rngs)
        self.attention_out_norm = Norm(config, width) if sandwich else None
        self.mlp_norm = None if config.block == "parallel_one_norm" else Norm(config, width)
        self.mlp = MLP(config, rngs)
        self.mlp_out_norm = Norm(config, width) if sandwich else None

    def __call__(self, x: jax.Array, inputs: LayerInputs) -> tuple[jax.Array, Buffers | None]:
        """x: [B, T, D]. Returns [B, T, D], or [B, N, D] with `output_positions`, and the buffers of the cache."""
        normed = self._input(x, self.attention_norm)
        if inputs.skip_norm is not None:
            normed = jnp.where(inputs.skip_norm, x, normed)
        normed = gathered(normed, None)
        update, buffers = self.attention(normed, inputs)
        update, places = scattered(update), inputs.output_positions
        x = x if places is None else at_positions(gathered(x, None), places, 1)
        if self.mlp_norm is None:
            return x + update + self._mlp(at_positions(normed, places, 1), inputs), buffers
        if self.form == "parallel":
            return x + update + self._mlp(self.mlp_norm(x), inputs), buffers
        x = self._add(x, update, self.attention_norm, self.attention_out_norm)
        update = self._mlp(self._input(x, self.mlp_norm), inputs)
        return self._add(x, update, self.mlp_norm, self.mlp_out_norm), buffers

    def _mlp(self, x: jax.Array, inputs: LayerInputs) -> jax.Array:
        return scattered(self.mlp(gathered(x, None), inputs.random))

    def _input(self, x: jax.Array, norm: Norm) -> jax.Array:
        return x if self.form in ("after", "post") else norm(x)

    def _add(self, x: jax.Array, update: jax.Array, norm: Norm, out_norm: Norm | None) -> jax.Array:
        if self.form == "post":
            return norm(x + update)
        if self.form == "after":
            return x + norm(update)
        return x + (update if out_norm is None else out_norm(update))

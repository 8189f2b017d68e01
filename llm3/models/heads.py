"""What the heads do besides their last product: the transform before the LM head, the pool of a task head."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from llm3.config.model_schema import ModelConfig
from llm3.models.layers import ACTIVATIONS, Norm, Projection, small_init


class Transform(nnx.Module):
    """norm(activation(dense(x))), before the LM head (Devlin et al. 2019, BERT, reference code). x: [B, T, D]."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.dense = dense(config, config.lm_transform_bias, rngs)
        self.activation = config.activation
        self.norm = Norm(config, {"embed": config.d_model})

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(ACTIVATIONS[self.activation](self.dense(x, dtype=jnp.float32))).astype(x.dtype)


def dense(config: ModelConfig, bias: bool, rngs: nnx.Rngs) -> Projection:
    """A linear map from D to D. Its outputs are not sharded: `embed` shards its inputs."""
    width = config.d_model
    return Projection({"embed": width}, {None: width}, init=small_init(width), bias=bias, rngs=rngs)


def pooled(x: jax.Array, segments: jax.Array, pool: str) -> jax.Array:
    """x [B, T, C] with the mean over its document, or the value at the first position of it, at every position.

    segments: int32 [B, T]. pool "last": x itself; callers read a document at its last token.
    """
    if pool == "last":
        return x
    read = segments[:, :, None] == segments[:, None, :]
    if pool == "first":
        starts = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
        read &= starts[:, None, :]
    same = read.astype(x.dtype)
    share = same / same.sum(axis=-1, keepdims=True)
    return jnp.einsum("bts,bsc->btc", share, x, precision="highest")


def without_task_head(params: dict, model: ModelConfig) -> tuple[dict, ModelConfig]:
    """Parameters and model as functions that read no task head see them: the same for every task.

    So a function that was compiled for the model before a task serves the model after it.
    """
    rest = {name: leaves for name, leaves in params.items() if name not in ("head", "pooler")}
    return rest, replace(model, classes=0, max_output_positions=0)

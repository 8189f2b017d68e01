"""Autoregressive language modelling: the next token of the same document."""

import jax
import jax.numpy as jnp

from llm3.data.batch import Batch
from llm3.models.transformer import Transformer
from llm3.objectives import Sums, Task

WINDOWS = {"text": "stream"}
HEAD = ""
LABELLED = False
CAUSAL = True


def token_losses(model: Transformer, batch: Batch, key: jax.Array | None = None) -> jax.Array:
    """The loss of each target in nats, float32 [B, T], not weighted. key: for dropout."""
    hidden = model(batch.tokens, batch.positions, batch.segments, key=key)
    return model.score(hidden, batch.targets)[0]


def loss(model: Transformer, batch: Batch, key: jax.Array, task: Task) -> Sums:
    """The sum of the losses of the targets, weighted by token."""
    del task
    return Sums(jnp.sum(token_losses(model, batch, key) * batch.weights), jnp.sum(batch.weights), {})

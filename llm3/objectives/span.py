"""Extractive reading comprehension: the start and end of an answer (Devlin et al. 2019, BERT, sections 4.2 and 4.3).

The task head gives each candidate position a start logit and an end logit; <bos> means "no answer here". The loss of an
example is the mean of two cross-entropies, of its start and of its end, over the positions of its chunk.
"""

import jax
import jax.numpy as jnp

from llm3.data.batch import Batch
from llm3.data.windows.spans import CHOICE, END, START
from llm3.models.transformer import Transformer
from llm3.objectives import Sums, Task

WINDOWS = {"span": "spans"}
HEAD = ("start", "end")
LABELLED = True
CAUSAL = None

LOWEST = -1e30  # logit of positions that cannot be chosen; finite, since 0 x infinity is not a number


def span_logits(model: Transformer, batch: Batch, key: jax.Array | None = None) -> jax.Array:
    """Start and end logits of each position, float32 [B, T, 2]. key: for dropout."""
    hidden = model(batch.tokens, batch.positions, batch.segments, key=key)
    assert model.head is not None  # an objective with a HEAD gets a model with a head
    return model.head(hidden.astype(jnp.float32))


def loss(model: Transformer, batch: Batch, key: jax.Array, task: Task) -> Sums:
    """The sum of the losses, weighted by example, and `exact`: both start and end have the highest logit."""
    del task
    logits = span_logits(model, batch, key)
    same = batch.segments[:, :, None] == batch.segments[:, None, :]
    choices = (batch.targets & CHOICE > 0)[..., None]
    right = jnp.stack([batch.targets & START, batch.targets & END], axis=-1) > 0

    def over_segment(values: jax.Array) -> jax.Array:
        """[B, T, 2] summed over the segment of each position."""
        return jnp.einsum("bts,bsc->btc", same.astype(values.dtype), values)

    highest = jax.lax.stop_gradient(_highest(jnp.where(choices, logits, LOWEST), same))
    powers = jnp.where(choices, jnp.exp(jnp.where(choices, logits - highest, 0)), 0)
    total = jnp.maximum(over_segment(powers), jnp.finfo(jnp.float32).tiny)  # padding has no candidates
    nats = over_segment(jnp.where(right, jnp.log(total) + highest - logits, 0)).mean(axis=-1)
    exact = jnp.all(over_segment((right & (logits >= highest)).astype(jnp.float32)) > 0, axis=-1)
    weights = batch.weights
    return Sums(jnp.sum(nats * weights), jnp.sum(weights), {"exact": jnp.sum(exact * weights)})


def _highest(values: jax.Array, same: jax.Array) -> jax.Array:
    """The maximum over the segment of each position: [B, T, 2] from [B, T, 2]."""
    columns = [jnp.max(jnp.where(same, values[:, None, :, i], LOWEST), axis=-1) for i in range(values.shape[-1])]
    return jnp.stack(columns, axis=-1)

"""One label for each document, read at the position where its weight stands."""

import jax
import jax.numpy as jnp
import optax

from llm3.data.batch import Batch
from llm3.models.transformer import Transformer
from llm3.objectives import Sums

WINDOWS = "examples"
NEEDS_HEAD = True
LABELLED = True


def class_logits(model: Transformer, batch: Batch, key: jax.Array | None = None) -> jax.Array:
    """Logits of the classes at each position: float32 [B, T, C]. key: for dropout."""
    hidden, _ = model(batch.tokens, batch.positions, batch.segments, key=key)
    return model.class_logits(hidden, batch.segments)


def loss(model: Transformer, batch: Batch, key: jax.Array) -> Sums:
    """The sum of the nats of the labels, weighted by example, and `accuracy`."""
    logits = class_logits(model, batch, key)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    correct = (jnp.argmax(logits, axis=-1) == batch.targets).astype(jnp.float32)
    return Sums(jnp.sum(nats * batch.weights), jnp.sum(batch.weights), {"accuracy": jnp.sum(correct * batch.weights)})

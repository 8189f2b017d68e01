"""One label for each document, read at the position where its weight stands."""

import jax
import jax.numpy as jnp
import optax

from llm3.data.batch import Batch
from llm3.models.layers import at_places
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
    if model.config.read_out:
        return _read_loss(model, batch, key)
    return _sums(class_logits(model, batch, key), batch.targets, batch.weights)


def _read_loss(model: Transformer, batch: Batch, key: jax.Array) -> Sums:
    """The same where labels stand at the last token of documents only: the last layer is computed for these."""
    places = jax.lax.top_k(batch.weights, model.config.read_out)[1]
    hidden, _ = model(batch.tokens, batch.positions, batch.segments, key=key, places=places)
    segments, targets, weights = (at_places(x, places, 1) for x in (batch.segments, batch.targets, batch.weights))
    return _sums(model.class_logits(hidden, segments), targets, weights)


def _sums(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> Sums:
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    correct = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
    return Sums(jnp.sum(nats * weights), jnp.sum(weights), {"accuracy": jnp.sum(correct * weights)})

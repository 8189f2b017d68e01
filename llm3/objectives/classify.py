"""Classification: a label, or a set of labels, for each document, read at the position that has a weight."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llm3.data.batch import Batch
from llm3.models.layers import at_positions
from llm3.models.transformer import Transformer
from llm3.objectives import Sums, Task

WINDOWS = {"text": "examples"}
HEAD = "labels"
LABELLED = True
CAUSAL = None


def class_logits(model: Transformer, batch: Batch, key: jax.Array | None = None) -> jax.Array:
    """Logits of the classes at each position: float32 [B, T, C]. key: for dropout."""
    hidden = model(batch.tokens, batch.positions, batch.segments, key=key)
    return model.class_logits(hidden, batch.segments)


def set_nats(logits: jax.Array, sets: jax.Array) -> jax.Array:
    """Mean over classes of the binary cross-entropy in nats: logits and sets [..., C] to [...]."""
    return optax.sigmoid_binary_cross_entropy(logits, sets).mean(axis=-1)


def loss(model: Transformer, batch: Batch, key: jax.Array, task: Task) -> Sums:
    """The sum of the losses of the labels, weighted by example, and `accuracy`. Label sets: see `set_nats`.

    A predicted label set is accurate if every class is right.
    """
    if not model.config.max_output_positions:
        return _sums(class_logits(model, batch, key), batch.targets, batch.weights, task.label_sets)
    # only the last token of a document has a label: the last layer is computed at these positions
    output_positions = jax.lax.top_k(batch.weights, model.config.max_output_positions)[1]
    hidden = model(batch.tokens, batch.positions, batch.segments, key=key, output_positions=output_positions)
    read = partial(at_positions, positions=output_positions, axis=1)
    segments, targets, weights = map(read, (batch.segments, batch.targets, batch.weights))
    return _sums(model.class_logits(hidden, segments), targets, weights, task.label_sets)


def _sums(logits: jax.Array, targets: jax.Array, weights: jax.Array, label_sets: np.ndarray | None) -> Sums:
    if label_sets is None:
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        correct = jnp.argmax(logits, axis=-1) == targets
    else:
        sets = jnp.asarray(label_sets)[targets]
        nats, correct = set_nats(logits, sets), jnp.all((logits > 0) == (sets > 0), axis=-1)
    return Sums(jnp.sum(nats * weights), jnp.sum(weights), {"accuracy": jnp.sum(correct * weights)})

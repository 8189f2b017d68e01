"""Accuracy and macro-F1 of the task head, beside the best constant answer."""

import jax
import jax.numpy as jnp
import numpy as np

from llm3.data.batch import Batch
from llm3.models.transformer import Transformer
from llm3.objectives.classify import class_logits

WINDOWS = "examples"
NEEDS_HEAD = True
BETTER = {"accuracy": "higher", "macro_f1": "higher", "nll": "lower"}


def sums(model: Transformer, batch: Batch, byte_lengths: np.ndarray) -> dict[str, jax.Array]:
    """The confusion counts [true class, predicted class], and the nats of the true classes."""
    del byte_lengths
    logits = class_logits(model, batch)
    classes = logits.shape[-1]
    true = jax.nn.one_hot(batch.targets, classes) * batch.weights[..., None]
    predicted = jax.nn.one_hot(jnp.argmax(logits, axis=-1), classes)
    nats = -jnp.sum(jax.nn.log_softmax(logits) * true)
    return {"confusion": jnp.einsum("btc,btd->cd", true, predicted), "nats": nats}


def figures(totals: dict[str, np.ndarray]) -> dict[str, float]:
    """accuracy; macro_f1, the mean over the classes that occur (in truth or prediction); majority_accuracy, of the
    most frequent class of this very set, so that no constant answer does better; nll in nats; items, their number.
    """
    confusion = totals["confusion"]
    items, hits = confusion.sum(), np.diag(confusion)
    seen = confusion.sum(axis=0) + confusion.sum(axis=1)  # 2 true positives + false positives + false negatives
    f1 = 2 * hits[seen > 0] / seen[seen > 0]
    return {
        "accuracy": float(hits.sum() / items),
        "macro_f1": float(f1.mean()),
        "majority_accuracy": float(confusion.sum(axis=1).max() / items),
        "nll": float(totals["nats"] / items),
        "items": int(items),
    }

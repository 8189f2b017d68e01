"""Classification: accuracy and F1 of the task head, by class, and the calibration of its probabilities.

If documents may have several labels, each class is a decision of its own, predicted if its probability exceeds 1/2.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm3.data.batch import Batch
from llm3.evals import EvalContext
from llm3.models.transformer import Transformer
from llm3.objectives.classify import class_logits, set_nats

WINDOWS = {"text": "examples"}
HEAD = "labels"
CAUSAL = None
BETTER = {
    "accuracy": "higher",
    "macro_f1": "higher",
    "micro_f1": "higher",
    "nll": "lower",
    "brier": "lower",
    "ece": "lower",
}
BINS = 15  # bins of confidence, equally wide


def sums(model: Transformer, batch: Batch) -> dict[str, jax.Array]:
    """confusion: counts [true class, predicted class]. nats, brier: sums over documents. bins: [BINS, 3], for documents
    with a confidence in (m / BINS, (m + 1) / BINS]: their number, the number of right ones, the sum of confidences.
    """
    logits = class_logits(model, batch)
    classes = logits.shape[-1]
    truth, weights = jax.nn.one_hot(batch.targets, classes), batch.weights
    logs = jax.nn.log_softmax(logits)
    predicted = jnp.argmax(logits, axis=-1)
    confidence = jnp.exp(jnp.max(logs, axis=-1))
    bins = jax.nn.one_hot(jnp.clip(jnp.ceil(confidence * BINS).astype(jnp.int32) - 1, 0, BINS - 1), BINS)
    counted = jnp.stack([jnp.ones_like(confidence), predicted == batch.targets, confidence], axis=-1)
    return {
        "confusion": jnp.einsum("btc,btd,bt->cd", truth, jax.nn.one_hot(predicted, classes), weights),
        "nats": -jnp.sum(jnp.sum(logs * truth, axis=-1) * weights),
        "brier": jnp.sum(jnp.sum((jnp.exp(logs) - truth) ** 2, axis=-1) * weights),
        "bins": jnp.einsum("btm,btj,bt->mj", bins, counted, weights),
    }


def set_sums(model: Transformer, batch: Batch, label_sets: jax.Array) -> dict[str, jax.Array]:
    """counts: [3, C], the true positives, predictions and labels of each class. label_sets: float32 [S, C]."""
    logits, weights = class_logits(model, batch), batch.weights
    truth, predicted = label_sets[batch.targets], (logits > 0).astype(jnp.float32)
    counted = jnp.stack([truth * predicted, predicted, truth])
    return {
        "counts": jnp.einsum("jbtc,bt->jc", counted, weights),
        "exact": jnp.sum(jnp.all(truth == predicted, axis=-1) * weights),
        "nats": jnp.sum(set_nats(logits, truth) * weights),
        "items": jnp.sum(weights),
    }


def evaluate(context: EvalContext) -> dict[str, Any]:
    """accuracy; macro_f1: mean over the classes that occur in truth or prediction; nll: in nats; items: number of
    documents; per_class: precision, recall, F1 and support by class name.

    One label per document: also majority_accuracy, the accuracy of always answering the most frequent class of this
    set; brier, the sum over classes of squared errors (Brier 1950: 0 to 2); ece, the expected calibration error (Guo et
    al. 2017, equation 3); confusion, counts[true][predicted] in the order of `classes`.
    Several labels: accuracy is the share of exactly predicted sets, nll the mean over classes; also micro_f1, over the
    decisions of all classes.
    """
    names, label_sets = list(context.cache.label_names), context.cache.label_sets
    if label_sets is None:
        return single_label_metrics(context.sums(sums), names)
    return label_set_metrics(context.sums(set_sums, jnp.asarray(multi_hot(label_sets, len(names)))), names)


def multi_hot(label_sets: list[list[int]], classes: int) -> np.ndarray:
    """Sets of class numbers as a multi-hot array, float32 [S, C]."""
    sets = np.zeros((len(label_sets), classes), np.float32)
    for row, members in zip(sets, label_sets, strict=True):
        row[members] = 1
    return sets


def single_label_metrics(totals: dict[str, np.ndarray], names: list[str]) -> dict[str, Any]:
    """The metrics, from the totals of `sums` over all documents."""
    confusion = totals["confusion"]
    items, hits = confusion.sum(), np.diag(confusion)
    f1, per_class = _by_class(hits, confusion.sum(axis=0), confusion.sum(axis=1), names)
    _, right, confidence = totals["bins"].T
    return {
        "accuracy": float(hits.sum() / items),
        "macro_f1": f1,
        "majority_accuracy": float(confusion.sum(axis=1).max() / items),
        "nll": float(totals["nats"] / items),
        "brier": float(totals["brier"] / items),
        "ece": float(np.abs(right - confidence).sum() / items),
        "items": int(items),
        "per_class": per_class,
        "confusion": {"classes": names, "counts": confusion.astype(int).tolist()},
    }


def label_set_metrics(totals: dict[str, np.ndarray], names: list[str]) -> dict[str, Any]:
    """The metrics, from the totals of `set_sums` over all documents."""
    hits, predicted, true = totals["counts"]
    macro_f1, per_class = _by_class(hits, predicted, true, names)
    decided = predicted.sum() + true.sum()
    return {
        "accuracy": float(totals["exact"] / totals["items"]),
        "macro_f1": macro_f1,
        "micro_f1": float(2 * hits.sum() / decided) if decided else 0.0,
        "nll": float(totals["nats"] / totals["items"]),
        "items": int(totals["items"]),
        "per_class": per_class,
    }


def _by_class(hits: np.ndarray, predicted: np.ndarray, true: np.ndarray, names: list[str]) -> tuple[float, dict]:
    """(macro_f1, {class name: metrics}) from counts [C], with 0 / 0 = 0."""
    ratios = [2 * hits / np.maximum(predicted + true, 1), hits / np.maximum(predicted, 1), hits / np.maximum(true, 1)]
    seen = predicted + true > 0
    table = {
        name: {"precision": float(precision), "recall": float(recall), "f1": float(f1), "support": int(support)}
        for name, f1, precision, recall, support in zip(names, *ratios, true, strict=True)
    }
    return float(ratios[0][seen].mean()) if seen.any() else 0.0, table

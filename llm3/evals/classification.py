"""Classification: accuracy and F1 of the task head, by class, and the calibration of its probabilities.

If documents may have several labels, each class is a decision of its own, predicted if its probability exceeds 1/2.
"""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from llm3.data.batch import Batch
from llm3.evals import EvalContext, by_item
from llm3.models.transformer import Transformer
from llm3.objectives.classify import class_logits

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


def document_logits(model: Transformer, batch: Batch, *, segments: int) -> dict[str, jax.Array]:
    """The logits of the classes for each segment, read at the position that has a weight: float32 [B, S, C]."""
    is_read = (batch.segments[:, None, :] == jnp.arange(1, segments + 1)[:, None]) & (batch.weights[:, None, :] > 0)
    positions = jnp.argmax(is_read, axis=-1)
    return {"logits": jnp.take_along_axis(class_logits(model, batch), positions[..., None], axis=1)}


def evaluate(context: EvalContext) -> dict[str, Any]:
    """accuracy; macro_f1: mean over the classes that occur in truth or prediction; nll: in nats; items: number of
    documents; per_class: precision, recall, F1 and support by class name.

    One label per document: also majority_accuracy, the accuracy of always answering the most frequent class of this
    set; brier, the sum over classes of squared errors (Brier 1950: 0 to 2); ece, the expected calibration error (Guo et
    al. 2017, equation 3); confusion, counts[true][predicted] in the order of `classes`.
    Several labels: accuracy is the share of exactly predicted sets, nll the mean over classes; also micro_f1, over the
    decisions of all classes.
    """
    cache, names = context.cache, list(context.cache.label_names)
    assert cache.labels is not None  # else it has no windows
    logits = context.by_document(document_logits)["logits"]
    if cache.label_sets is None:
        truth = np.asarray(cache.labels)
        metrics, columns = single_label_metrics(logits, truth, names), single_label_columns(logits, truth, names)
    else:
        sets = multi_hot(cache.label_sets, len(names))[cache.labels]
        metrics, columns = label_set_metrics(logits, sets, names), label_set_columns(logits, sets, names)
    return metrics | {"predictions": by_item(columns, cache.rows) | {"classes": names}}


def multi_hot(label_sets: list[list[int]], classes: int) -> np.ndarray:
    """Sets of class numbers as a multi-hot array, float32 [S, C]."""
    sets = np.zeros((len(label_sets), classes), np.float32)
    for row, members in zip(sets, label_sets, strict=True):
        row[members] = 1
    return sets


def single_label_columns(logits: np.ndarray, truth: np.ndarray, names: list[str]) -> dict[str, Any]:
    """The columns of predictions. logits: float64 [N, C]. truth: int [N]."""
    logs = scipy.special.log_softmax(logits, axis=-1)
    predicted = logits.argmax(axis=-1)
    return {
        "truth": [names[each] for each in truth],
        "prediction": [names[each] for each in predicted],
        "score": (predicted == truth).astype(np.float64),
        "nats": -np.take_along_axis(logs, truth[:, None], axis=-1)[:, 0],
        "confidence": np.exp(logs.max(axis=-1)),
        "probabilities": np.exp(logs).astype(np.float32),
    }


def single_label_metrics(logits: np.ndarray, truth: np.ndarray, names: list[str]) -> dict[str, Any]:
    """The metrics of documents with one label each. logits: float64 [N, C]. truth: int [N]."""
    logs = scipy.special.log_softmax(logits, axis=-1)
    probabilities, predicted = np.exp(logs), logits.argmax(axis=-1)
    confusion = np.zeros((len(names), len(names)), np.int64)
    np.add.at(confusion, (truth, predicted), 1)
    f1, per_class = _by_class(np.diag(confusion), confusion.sum(axis=0), confusion.sum(axis=1), names)
    return {
        "accuracy": float(np.mean(predicted == truth)),
        "macro_f1": f1,
        "majority_accuracy": float(confusion.sum(axis=1).max() / len(truth)),
        "nll": float(-np.mean(np.take_along_axis(logs, truth[:, None], axis=-1))),
        "brier": float(np.mean(np.sum((probabilities - np.eye(len(names))[truth]) ** 2, axis=-1))),
        "ece": calibration_error(probabilities.max(axis=-1), predicted == truth),
        "items": len(truth),
        "per_class": per_class,
        "confusion": {"classes": names, "counts": confusion.tolist()},
    }


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """The expected calibration error, in bins (m / BINS, (m + 1) / BINS] of confidence. Both arrays: [N]."""
    with np.errstate(invalid="ignore"):  # of a model with NaNs, the error is NaN
        bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    return float(np.abs(np.bincount(bins, weights=right - confidence)).sum() / len(right))


def label_set_columns(logits: np.ndarray, sets: np.ndarray, names: list[str]) -> dict[str, Any]:
    """The columns of predictions; truth and prediction are JSON lists. logits, sets: float [N, C]."""
    predicted = logits > 0

    def texts(members: np.ndarray) -> list[str]:
        return [json.dumps([names[each] for each in np.flatnonzero(row)], ensure_ascii=False) for row in members]

    return {
        "truth": texts(sets > 0),
        "prediction": texts(predicted),
        "score": np.all(predicted == (sets > 0), axis=-1).astype(np.float64),
        "nats": _set_nats(logits, sets),
        "probabilities": scipy.special.expit(logits).astype(np.float32),
    }


def label_set_metrics(logits: np.ndarray, sets: np.ndarray, names: list[str]) -> dict[str, Any]:
    """The metrics of documents with any number of labels. logits, sets: float [N, C]."""
    found, true = logits > 0, sets > 0
    hits, predicted, labels = (each.sum(axis=0) for each in (found & true, found, true))
    macro_f1, per_class = _by_class(hits, predicted, labels, names)
    decided = predicted.sum() + labels.sum()
    return {
        "accuracy": float(np.mean(np.all(found == true, axis=-1))),
        "macro_f1": macro_f1,
        "micro_f1": float(2 * hits.sum() / decided) if decided else 0.0,
        "nll": float(np.mean(_set_nats(logits, sets))),
        "items": len(sets),
        "per_class": per_class,
    }


def _set_nats(logits: np.ndarray, sets: np.ndarray) -> np.ndarray:
    """Mean over classes of the binary cross-entropy in nats: [N, C] to [N]."""
    return np.mean(np.logaddexp(0, logits) - sets * logits, axis=-1)


def _by_class(hits: np.ndarray, predicted: np.ndarray, true: np.ndarray, names: list[str]) -> tuple[float, dict]:
    """(macro_f1, {class name: metrics}) from counts [C], with 0 / 0 = 0."""
    ratios = [2 * hits / np.maximum(predicted + true, 1), hits / np.maximum(predicted, 1), hits / np.maximum(true, 1)]
    seen = predicted + true > 0
    table = {
        name: {"precision": float(precision), "recall": float(recall), "f1": float(f1), "support": int(support)}
        for name, f1, precision, recall, support in zip(names, *ratios, true, strict=True)
    }
    return float(ratios[0][seen].mean()) if seen.any() else 0.0, table

"""The documents of lm-eval's tasks as columns of predictions."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np


def predictions(
    samples: Mapping[str, Sequence[dict[str, Any]]], name_of: Callable[[str, str], str]
) -> dict[str, dict[str, Any]]:
    """{name_of(task, filter): columns} from lm-eval's samples, {task: documents}. `item` is lm-eval's `doc_id`.

    `score` and a column of each metric that is a number for a document; the first metric is the score.
    """
    found = {}
    for task, documents in samples.items():
        for each in dict.fromkeys(document["filter"] for document in documents):
            own = sorted((one for one in documents if one["filter"] == each), key=lambda one: one["doc_id"])
            found[name_of(task, each)] = _columns(own)
    return found


def _columns(documents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    metrics = {
        name: np.array([float(document[name]) for document in documents])
        for name in documents[0]["metrics"]
        if all(isinstance(document.get(name), bool | int | float | np.number) for document in documents)
    }
    texts, predicted, nats = zip(*map(_result, documents), strict=True)
    columns: dict[str, Any] = {
        "item": np.array([document["doc_id"] for document in documents], np.int64),
        "truth": list(texts),
        "prediction": list(predicted),
    }
    if metrics:
        columns["score"] = next(iter(metrics.values()))
    if all(each is not None for each in nats):
        columns["nats"] = np.array(nats, np.float64)
    return metrics | columns


def _result(document: dict[str, Any]) -> tuple[str, str, float | None]:
    """(truth, prediction, nats of the truth, where they are known) of a document."""
    target, scores = document["target"], list(_log_likelihoods(document["filtered_resps"]))
    if not scores:
        return str(target), str(document["filtered_resps"][0]), None
    choices = _choices(document["arguments"][: len(scores)])
    if len(scores) == 1:
        return str(target), "", -scores[0]
    best = choices[int(np.argmax(scores))]
    if isinstance(target, int) and 0 <= target < len(choices):
        return choices[target], best, -scores[target]
    return str(target), best, None


def _log_likelihoods(responses: Sequence[Any]) -> Iterator[float]:
    for each in responses:
        value = each[0] if isinstance(each, tuple | list) and each else each
        if isinstance(value, int | float | np.number):
            yield float(value)


def _choices(arguments: Sequence[Sequence[Any]]) -> list[str]:
    """What distinguishes the requests of a document: what they continue with, or else what is continued."""
    ends = [str(each[-1]).strip() for each in arguments]
    return ends if len(set(ends)) > 1 else [str(each[0]) for each in arguments]

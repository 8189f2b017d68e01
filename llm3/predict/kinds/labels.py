"""The label of each document, with its probability; or all labels with a probability above 1/2, if it may have several.

A document longer than the window is cut as in training.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pyarrow as pa

from llm3.data.batch import Batch
from llm3.data.formats import Document
from llm3.models.layers import at_positions
from llm3.models.transformer import Transformer
from llm3.objectives.classify import class_logits
from llm3.predict.fields import Fields
from llm3.predict.session import Item, Session, pieces, shortest, size_class
from llm3.predict.trained import Trained

FORMATS = ("text",)
ROWS = 1024


@dataclasses.dataclass(frozen=True)
class Options:
    """probabilities: also give the probabilities of all classes."""

    probabilities: bool = False


def least_length(options: Options) -> int:
    """A start, a token of the text and an end."""
    return 3


def refusal(trained: Trained) -> str:
    """A stage without labels has none to give."""
    return "" if trained.head == "labels" else "it has no task head of labels"


def read(row: dict[str, Any], fields: Fields) -> dict[str, Any]:
    """The text or the pair of texts. Raises BadRow."""
    return fields.plugin.read_input(row, fields.source)


def encode(record: dict[str, Any], fields: Fields, trained: Trained, tokenizer: Any, options: Options) -> Document:
    """The document as in training."""
    return fields.plugin.encode(record, tokenizer, trained.template)


def columns(trained: Trained, options: Options) -> dict[str, pa.DataType]:
    """label (or labels), probability, and probabilities if asked for; truncated: the document lost tokens."""
    names, number = pa.string(), pa.float32()
    if trained.several_labels:
        found = {"labels": pa.list_(names), "probability": pa.list_(number)}
    else:
        found = {"label": names, "probability": number}
    if options.probabilities:
        found["probabilities"] = pa.struct([(name, number) for name in trained.labels])
    return found | {"truncated": pa.bool_()}


def document_logits(model: Transformer, batch: Batch, *, most: int) -> dict[str, jax.Array]:
    """Class logits of the first `most` documents of each window: float32 [B, most, C]."""
    positions = jax.lax.top_k(batch.weights, most)[1]  # a document has its weight at its last token
    return {"logits": at_positions(class_logits(model, batch), positions, 1)}


def predict(session: Session, items: Sequence[Item]) -> list[dict[str, Any]]:
    """The labels of each document, from probabilities in float64."""
    context = session.context(items, "examples")
    table = context.table()
    most = min(session.length, size_class(table.max_pieces))
    found: list[dict[str, Any]] = [{}] * len(items)
    for piece in pieces(context, functools.partial(document_logits, most=most), table):
        logits = piece.result["logits"][piece.number].astype(np.float64)
        truncated = len(items[piece.document].document.tokens) > session.length
        found[piece.document] = labelled(session, logits) | {"truncated": truncated}
    return found


def labelled(session: Session, logits: np.ndarray) -> dict[str, Any]:
    """The columns of a document but for `truncated`. logits: float64 [C]."""
    names = session.trained.labels
    if session.trained.several_labels:
        shares = 1 / (1 + np.exp(-logits))
        chosen = np.flatnonzero(logits > 0).tolist()
        result: dict[str, Any] = {
            "labels": [names[i] for i in chosen],
            "probability": [shortest(shares[i]) for i in chosen],
        }
    else:
        powers = np.exp(logits - logits.max())
        shares, best = powers / powers.sum(), int(np.argmax(logits))
        result = {"label": names[best], "probability": shortest(shares[best])}
    if session.options.probabilities:
        result["probabilities"] = dict(zip(names, map(shortest, shares), strict=True))
    return result

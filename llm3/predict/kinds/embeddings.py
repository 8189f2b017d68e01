"""The mean of the final hidden states over the tokens of each document, special tokens included, in float32.

A document longer than the window is cut as in training.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import pyarrow as pa

from llm3.data.batch import Batch
from llm3.data.formats import Document
from llm3.models.transformer import Transformer
from llm3.predict.fields import Fields
from llm3.predict.session import Item, Session, pieces, shortest, size_class
from llm3.predict.trained import Trained

FORMATS = ("text", "dialogue", "choice", "span")
ROWS = 256


def least_length(options: None) -> int:
    """A start, a token of the text and an end."""
    return 3


def refusal(trained: Trained) -> str:
    """Any model has hidden states."""
    return ""


def read(row: dict[str, Any], fields: Fields) -> dict[str, Any]:
    """The content without labels and answers. Raises BadRow."""
    return fields.plugin.read_input(row, fields.source)


def encode(record: dict[str, Any], fields: Fields, trained: Trained, tokenizer: Any, options: None) -> Document:
    """The document as in training; of a dialogue, the part before the answer."""
    prompts = fields.row_format in ("dialogue", "choice")
    encoder = fields.plugin.encode_prompt if prompts else fields.plugin.encode
    return encoder(record, tokenizer, trained.template)


def columns(trained: Trained, options: None) -> dict[str, pa.DataType]:
    """embedding; truncated: the document lost tokens."""
    return {"embedding": pa.list_(pa.float32()), "truncated": pa.bool_()}


def means(model: Transformer, batch: Batch, *, most: int) -> dict[str, jax.Array]:
    """The mean hidden state of the first `most` documents of each window: float32 [B, most, D]."""
    hidden = model(batch.tokens, batch.positions, batch.segments)
    inside = (batch.segments[:, :, None] == jnp.arange(1, most + 1)).astype(jnp.float32)
    sums = jnp.einsum("bts,btd->bsd", inside, hidden.astype(jnp.float32), precision="highest")
    return {"means": sums / jnp.maximum(inside.sum(axis=1), 1)[..., None]}


def predict(session: Session, items: Sequence[Item]) -> list[dict[str, Any]]:
    """The embedding of each row."""
    context = session.context(items, "examples")
    table = context.table()
    run = functools.partial(means, most=min(session.length, size_class(table.max_pieces)))
    found: list[dict[str, Any]] = [{}] * len(items)
    for piece in pieces(context, run, table):
        embedding = [shortest(each) for each in piece.result["means"][piece.number]]
        truncated = len(items[piece.document].document.tokens) > session.length
        found[piece.document] = {"embedding": embedding, "truncated": truncated}
    return found

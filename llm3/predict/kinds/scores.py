"""How likely each text is to a causal model: nats, tokens, bytes and bits per byte; of a dialogue, its answers.

A text longer than the window is read in pieces from its own start, as by the evaluation `perplexity`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pyarrow as pa

from llm3.data.batch import Batch
from llm3.data.formats import Document, bytes_of
from llm3.evals.perplexity import bits_per_byte
from llm3.models.transformer import Transformer
from llm3.objectives.causal import token_losses
from llm3.predict.fields import Fields
from llm3.predict.kinds.answers import refusal
from llm3.predict.session import Item, Session, pieces
from llm3.predict.trained import Trained

FORMATS = ("text", "dialogue")
ROWS = 1024
ANSWERED = True
__all__ = ["ANSWERED", "FORMATS", "ROWS", "columns", "encode", "least_length", "predict", "read", "refusal"]


def least_length(options: None) -> int:
    """As the windows of pieces."""
    return 2


def read(row: dict[str, Any], fields: Fields) -> dict[str, Any]:
    """The text, or the dialogue with its answers. Raises BadRow."""
    reader = fields.plugin.read_input if fields.row_format == "text" else fields.plugin.read_row
    return reader(row, fields.source)


def encode(record: dict[str, Any], fields: Fields, trained: Trained, tokenizer: Any, options: None) -> Document:
    """The document as in training; its bytes are those of the answers, if it has any."""
    document = fields.plugin.encode(record, tokenizer, trained.template)
    if document.answer_mask is None:
        return document
    answers = (content for role, content in record["turns"] if role == "assistant")
    return document._replace(text_bytes=bytes_of(answers))


def columns(trained: Trained, options: None) -> dict[str, pa.DataType]:
    """nats of the text tokens, tokens (their number), bytes of the text in UTF-8, bits_per_byte."""
    return {"nats": pa.float64(), "tokens": pa.int64(), "bytes": pa.int64(), "bits_per_byte": pa.float64()}


def token_nats(model: Transformer, batch: Batch) -> dict[str, jax.Array]:
    """The loss of the next token of each position: float32 [B, T]."""
    return {"nats": token_losses(model, batch)}


def predict(session: Session, items: Sequence[Item]) -> list[dict[str, Any]]:
    """The scores of each row. Special tokens are not counted."""
    context = session.context(items, "pieces")
    nats, counts = np.zeros(len(items)), np.zeros(len(items), np.int64)
    for piece in pieces(context, token_nats, context.table()):
        document = items[piece.document].document
        targets = slice(piece.first + 1, piece.stop + 1)
        counted = session.tokenizer.is_text[document.tokens[targets]]
        if document.answer_mask is not None:
            counted = counted & document.answer_mask[targets]
        nats[piece.document] += piece.result["nats"][piece.place].astype(np.float64)[counted].sum()
        counts[piece.document] += counted.sum()
    return [
        {
            "nats": float(total),
            "tokens": int(count),
            "bytes": (size := item.document.text_bytes),
            "bits_per_byte": bits_per_byte(total, size) if size else None,
        }
        for item, total, count in zip(items, nats, counts, strict=True)
    ]

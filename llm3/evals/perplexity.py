"""Bits per byte of held-out text: total nats / (ln 2 x total UTF-8 bytes) of all targets but special tokens."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from llm3.data.batch import Batch
from llm3.evals import EvalContext, by_item, segment_sums
from llm3.models.transformer import Transformer
from llm3.objectives.causal import token_losses

WINDOWS = {"text": "pieces"}
HEAD = ""
CAUSAL = True
BETTER = {"bits_per_byte": "lower"}


def sums(model: Transformer, batch: Batch, is_text: jax.Array, *, segments: int) -> dict[str, jax.Array]:
    """Nats of the targets that are text tokens, by segment. is_text: bool [V]."""
    real = is_text[batch.targets] & (batch.weights > 0)
    nats = jnp.where(real, token_losses(model, batch), 0)
    return {"nats": segment_sums(nats, batch, segments)}


def bits_per_byte(nats: float, text_bytes: float) -> float:
    """Bits per byte, from the totals over all documents."""
    return float(nats / (math.log(2) * text_bytes))


def evaluate(context: EvalContext) -> dict[str, Any]:
    """bits_per_byte; if documents have tags, also by_tag: {tag: bits per byte of its documents}.

    Bytes are those of the original texts, so models with different tokenizers can be compared: each text token is a
    target exactly once, and a normalizer that shortens a text makes its bytes no fewer.
    """
    cache = context.cache
    nats = context.by_document(sums, jnp.asarray(context.tokenizer.is_text))["nats"]
    columns: dict[str, Any] = {"nats": nats, "bytes": cache.document_bytes}
    result: dict[str, Any] = {"bits_per_byte": bits_per_byte(nats.sum(), cache.text_bytes)}
    if cache.labels is not None:
        tagged = {name: cache.labels == number for number, name in enumerate(cache.label_names)}
        parts = {tag: (nats[own].sum(), cache.document_bytes[own].sum()) for tag, own in tagged.items() if own.any()}
        result["by_tag"] = {tag: bits_per_byte(*each) for tag, each in parts.items()}
        columns["tag"] = [cache.label_names[number] for number in cache.labels]
    return result | {"predictions": by_item(columns, cache.rows)}

"""Bits per byte of held-out text: total nats / (ln 2 x total UTF-8 bytes) of all targets but special tokens."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm3.data.batch import Batch
from llm3.evals import EvalContext
from llm3.models.transformer import Transformer
from llm3.objectives.causal import token_losses

WINDOWS = {"text": "pieces"}
HEAD = ""
CAUSAL = True
BETTER = {"bits_per_byte": "lower"}


def sums(model: Transformer, batch: Batch, is_text: jax.Array) -> dict[str, jax.Array]:
    """Nats and number of the targets that are text tokens. is_text: bool [V]."""
    real = is_text[batch.targets] & (batch.weights > 0)
    nats = jnp.where(real, token_losses(model, batch), 0)
    return {"nats": jnp.sum(nats), "targets": jnp.sum(real)}


def bits_per_byte(nats: float, text_bytes: float) -> float:
    """Bits per byte, from the totals over all documents."""
    return float(nats / (math.log(2) * text_bytes))


def evaluate(context: EvalContext) -> dict[str, Any]:
    """bits_per_byte; if documents have tags, also by_tag: {tag: bits per byte of its documents}.

    Bytes are those of the original texts, so models with different tokenizers can be compared: each text token is a
    target exactly once, and a normalizer that shortens a text makes its bytes no fewer.
    """
    parts = {"": context.cache}
    if context.cache.labels is not None:
        tags = zip(context.cache.label_names, range(len(context.cache.label_names)), strict=True)
        parts = {name: context.cache.subset(np.flatnonzero(context.cache.labels == number)) for name, number in tags}
    is_text = jnp.asarray(context.tokenizer.is_text)
    totals = {
        tag: (float(context.sums(sums, is_text, table=context.table(part))["nats"]), part.text_bytes)
        for tag, part in parts.items()
        if part.documents
    }
    by_tag = {tag: bits_per_byte(*each) for tag, each in totals.items() if tag}
    nats, text_bytes = (sum(each) for each in zip(*totals.values(), strict=True))
    return {"bits_per_byte": bits_per_byte(nats, text_bytes)} | ({"by_tag": by_tag} if by_tag else {})

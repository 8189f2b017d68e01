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


def sums(model: Transformer, batch: Batch, byte_lengths: jax.Array) -> dict[str, jax.Array]:
    """Nats, bytes and number of the targets that are text tokens. byte_lengths: int32 [V]."""
    lengths = byte_lengths[batch.targets] * batch.weights
    real = lengths > 0
    nats = jnp.where(real, token_losses(model, batch), 0)
    return {"nats": jnp.sum(nats), "bytes": jnp.sum(lengths), "targets": jnp.sum(real)}


def bits_per_byte(totals: dict[str, np.ndarray]) -> float:
    """Bits per byte, from the totals of `sums` over all documents."""
    return float(totals["nats"] / (math.log(2) * totals["bytes"]))


def evaluate(context: EvalContext) -> dict[str, Any]:
    """bits_per_byte; if documents have tags, also by_tag: {tag: bits per byte of its documents}."""
    parts = {"": context.cache}
    if context.cache.labels is not None:
        tags = zip(context.cache.label_names, range(len(context.cache.label_names)), strict=True)
        parts = {name: context.cache.subset(np.flatnonzero(context.cache.labels == number)) for name, number in tags}
    lengths = jnp.asarray(context.tokenizer.byte_lengths)
    totals = {
        tag: context.sums(sums, lengths, table=context.table(part)) for tag, part in parts.items() if part.documents
    }
    overall = {name: sum((each[name] for each in totals.values()), np.zeros(())) for name in ("nats", "bytes")}
    by_tag = {tag: bits_per_byte(each) for tag, each in totals.items() if tag}
    return {"bits_per_byte": bits_per_byte(overall)} | ({"by_tag": by_tag} if by_tag else {})

"""Bits per byte of held-out text: the nats of all targets / (ln 2 x their UTF-8 bytes), special tokens excluded."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from llm3.data.batch import Batch
from llm3.models.transformer import Transformer
from llm3.objectives.causal import token_losses

WINDOWS = "pieces"
NEEDS_HEAD = False
BETTER = {"bits_per_byte": "lower"}


def sums(model: Transformer, batch: Batch, byte_lengths: np.ndarray) -> dict[str, jax.Array]:
    """Nats, bytes and the number of the targets that stand for text."""
    lengths = jnp.asarray(byte_lengths)[batch.targets] * batch.weights
    real = lengths > 0
    nats = jnp.where(real, token_losses(model, batch), 0)
    return {"nats": jnp.sum(nats), "bytes": jnp.sum(lengths), "targets": jnp.sum(real)}


def figures(totals: dict[str, np.ndarray]) -> dict[str, float]:
    """bits_per_byte."""
    return {"bits_per_byte": float(totals["nats"] / (math.log(2) * totals["bytes"]))}

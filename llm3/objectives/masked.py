"""Masked language modelling: hidden tokens from both sides (Devlin et al. 2019, BERT, section 3.1).

Of the text tokens 15 % are to be predicted: 80 % of these are replaced by the mask token, 10 % by a random one, and
10 % stay as they are.
"""

import jax
import jax.numpy as jnp

from llm3.data.batch import Batch
from llm3.data.tokenizer import SPECIALS, Tokenizer
from llm3.models.transformer import Transformer
from llm3.objectives import Sums, causal

WINDOWS = "stream"
NEEDS_HEAD = False
LABELLED = False
HIDDEN, MASKED, REPLACED = 0.15, 0.8, 0.1


def prepare(batch: Batch, key: jax.Array, vocab_size: int) -> Batch:
    """The batch with tokens hidden: their targets are what they were, their weights 1, all others 0."""
    choose, act, draw = jax.random.split(key, 3)
    shape, first = batch.tokens.shape, len(SPECIALS)
    text = (batch.segments > 0) & (batch.tokens >= first)
    hidden = text & jax.random.bernoulli(choose, HIDDEN, shape)
    action = jax.random.uniform(act, shape)
    random = jax.random.randint(draw, shape, first, vocab_size, batch.tokens.dtype)
    changed = jnp.where(action < MASKED, Tokenizer.mask_id, jnp.where(action < MASKED + REPLACED, random, batch.tokens))
    tokens = jnp.where(hidden, changed, batch.tokens)
    return batch._replace(tokens=tokens, targets=batch.tokens, weights=hidden.astype(jnp.float32))


def loss(model: Transformer, batch: Batch, key: jax.Array) -> Sums:
    """The sum of the nats of the hidden tokens of a prepared batch, weighted by token."""
    return causal.loss(model, batch, key)

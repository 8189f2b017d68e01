"""Pseudo-perplexity of a bidirectional model, which hides each token in turn (Salazar et al. 2020, section 2.2)."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm3.data.batch import Batch
from llm3.data.tokenizer import Tokenizer
from llm3.errors import UserError
from llm3.evals import EvalContext, by_item, segment_sums
from llm3.evals.perplexity import bits_per_byte
from llm3.models.layers import at_positions
from llm3.models.transformer import Transformer

WINDOWS = {"text": "pieces"}
HEAD = ""
CAUSAL = False
BETTER = {"pseudo_perplexity": "lower", "pseudo_bits_per_byte": "lower"}


def sums(model: Transformer, batch: Batch, is_text: jax.Array, *, mask_id: int, segments: int) -> dict[str, jax.Array]:
    """Nats and number of the text tokens, by segment.

    is_text: bool [V]. mask_id: the token that hides others.
    Documents of a window do not attend to each other, so the p-th token of each is hidden in the same pass. There are
    as many passes as the longest document has tokens.
    """
    text = is_text[batch.tokens] & (batch.segments > 0)

    def hide(position: jax.Array, nats: jax.Array) -> jax.Array:
        hidden = (batch.positions == position) & text
        tokens = jnp.where(hidden, mask_id, batch.tokens)
        weights, output_positions = jax.lax.top_k(hidden.astype(jnp.float32), min(segments, hidden.shape[1]))
        states = model(tokens, batch.positions, batch.segments, output_positions=output_positions)
        hidden_tokens = Batch(*(at_positions(each, output_positions, 1) for each in batch))
        losses, _ = model.score(states, hidden_tokens.tokens)
        return nats + segment_sums(losses * weights, hidden_tokens, segments)

    nats = jax.lax.fori_loop(0, jnp.max(batch.positions) + 1, hide, jnp.zeros((len(text), segments)))
    return {"nats": nats, "tokens": segment_sums(text, batch, segments)}


def check_tokenizer(tokenizer: Tokenizer, options: None) -> None:
    """Raise UserError if there is no mask token."""
    tokenizer.need_mask()


def evaluate(context: EvalContext) -> dict[str, Any]:
    """pseudo_perplexity (per text token), pseudo_bits_per_byte, items (text tokens). Special tokens are never hidden.

    Costs about `sequence_length` forward passes. Raises UserError if there is no text.
    """
    run = partial(sums, mask_id=context.tokenizer.need_mask())
    found = context.by_document(run, jnp.asarray(context.tokenizer.is_text))
    if not found or not found["tokens"].any():
        raise UserError(f"evaluation pseudo_perplexity: {context.config.source} has no text")
    nats, tokens = found["nats"], found["tokens"].astype(np.int64)
    columns = {"nats": nats, "bytes": context.cache.document_bytes, "tokens": tokens}
    return {
        "pseudo_perplexity": math.exp(nats.sum() / tokens.sum()),
        "pseudo_bits_per_byte": bits_per_byte(nats.sum(), context.cache.text_bytes),
        "items": int(tokens.sum()),
        "predictions": by_item(columns, context.cache.rows),
    }

"""Pseudo-perplexity of a bidirectional model, which hides each token in turn (Salazar et al. 2020, section 2.2)."""

import math
from functools import partial

import jax
import jax.numpy as jnp

from llm3.data.batch import Batch
from llm3.data.tokenizer import Tokenizer
from llm3.errors import UserError
from llm3.evals import EvalContext
from llm3.models.layers import at_positions
from llm3.models.transformer import Transformer

WINDOWS = {"text": "pieces"}
HEAD = ""
CAUSAL = False
BETTER = {"pseudo_perplexity": "lower", "pseudo_bits_per_byte": "lower"}


def sums(
    model: Transformer, batch: Batch, is_text: jax.Array, *, mask_id: int, max_segments: int
) -> dict[str, jax.Array]:
    """Nats and number of the text tokens.

    is_text: bool [V]. mask_id: the token that hides others. max_segments: max segments per window.
    Documents of a window do not attend to each other, so the p-th token of each is hidden in the same pass. There are
    as many passes as the longest document has tokens.
    """
    text = is_text[batch.tokens] & (batch.segments > 0)

    def hide(position: jax.Array, nats: jax.Array) -> jax.Array:
        hidden = (batch.positions == position) & text
        tokens = jnp.where(hidden, mask_id, batch.tokens)
        weights, output_positions = jax.lax.top_k(hidden.astype(jnp.float32), max_segments)
        states, _ = model(tokens, batch.positions, batch.segments, output_positions=output_positions)
        losses, _ = model.score(states, at_positions(batch.tokens, output_positions, 1))
        return nats + jnp.sum(losses * weights)

    nats = jax.lax.fori_loop(0, jnp.max(batch.positions) + 1, hide, jnp.zeros(()))
    return {"nats": nats, "tokens": jnp.sum(text)}


def check_tokenizer(tokenizer: Tokenizer, options: None) -> None:
    """Raise UserError if there is no mask token."""
    tokenizer.need_mask()


def evaluate(context: EvalContext) -> dict[str, float | int]:
    """pseudo_perplexity (per text token), pseudo_bits_per_byte, items (text tokens). Special tokens are never hidden.

    Costs about `sequence_length` forward passes. Raises UserError if there is no text.
    """
    table = context.table()
    max_segments = max((int(table[window].segments.max()) for window in range(len(table))), default=1)
    run = partial(sums, mask_id=context.tokenizer.need_mask(), max_segments=max_segments)
    totals = context.sums(run, jnp.asarray(context.tokenizer.is_text), table=table)
    if not totals or not totals["tokens"]:
        raise UserError(f"evaluation pseudo_perplexity: {context.config.source} has no text")
    return {
        "pseudo_perplexity": math.exp(totals["nats"] / totals["tokens"]),
        "pseudo_bits_per_byte": float(totals["nats"] / (math.log(2) * context.cache.text_bytes)),
        "items": int(totals["tokens"]),
    }

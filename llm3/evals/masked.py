"""Masked-token accuracy on held-out text, compared with the best constant guess."""

import dataclasses
import hashlib
from typing import Any

import jax
import numpy as np

from llm3.data.batch import Batch
from llm3.data.tokenizer import Tokenizer
from llm3.errors import UserError, check_share
from llm3.evals import EvalContext, by_item, segment_sums
from llm3.models.transformer import Transformer
from llm3.objectives.masked import choose

WINDOWS = {"text": "pieces"}
HEAD = ""
CAUSAL = False
PER_TOKEN = True
BETTER = {"accuracy": "higher", "nll": "lower"}


@dataclasses.dataclass(frozen=True)
class Options:
    """share: share of the text tokens that are hidden. whole_words: hide all tokens of a word or none.

    seed: the hidden tokens of a piece of a document depend on this seed and on the tokens of the piece only.
    """

    share: float = 0.15
    whole_words: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_share("share", self.share)


def sums(model: Transformer, batch: Batch, *, segments: int) -> dict[str, jax.Array]:
    """By segment: the loss of the hidden tokens in nats, the number of them, and of those that are guessed right."""
    hidden = model(batch.tokens, batch.positions, batch.segments)
    nats, correct = model.score(hidden, batch.targets)
    parts = {"nats": nats * batch.weights, "correct": correct * batch.weights, "tokens": batch.weights}
    return {name: segment_sums(values, batch, segments) for name, values in parts.items()}


def hide(batch: Batch, options: Options, tokenizer: Tokenizer) -> Batch:
    """The batch with chosen tokens of each segment replaced by the mask token. These tokens are the targets."""
    hidden = np.zeros(batch.tokens.shape, bool)
    for row in range(len(hidden)):
        window = Batch(*(field[row] for field in batch))
        for segment in np.unique(window.segments[window.segments > 0]):
            inside = window.segments == segment
            piece = Batch(*(field[inside] for field in window))
            digest = hashlib.sha256(piece.tokens.astype("<i4").tobytes()).digest()
            rng = np.random.default_rng([options.seed, *np.frombuffer(digest, "<u4")])
            hidden[row, inside] = choose(piece, options.share, options.whole_words, rng, tokenizer)
    tokens = np.where(hidden, np.int32(tokenizer.need_mask()), batch.tokens)
    return batch._replace(tokens=tokens, targets=batch.tokens, weights=hidden.astype(np.float32))


def check_tokenizer(tokenizer: Tokenizer, options: Options) -> None:
    """Raise UserError if there is no mask token."""
    tokenizer.need_mask()


def evaluate(context: EvalContext) -> dict[str, Any]:
    """accuracy and nll (in nats) of the hidden tokens; majority_accuracy: accuracy of always guessing the most frequent
    of them; items: their number. All are replaced by the mask token, unlike in training.

    Raises UserError if there is no token to hide.
    """
    counts = np.zeros(context.tokenizer.vocab_size, np.int64)

    def change(batch: Batch) -> Batch:
        changed = hide(batch, context.options, context.tokenizer)
        counts[:] += np.bincount(changed.targets[changed.weights > 0], minlength=len(counts))
        return changed

    found = context.by_document(sums, change=change)
    items = int(counts.sum())
    if not items:
        raise UserError(f"evaluation masked: {context.config.source} has too little text to hide any token")
    has_items = found["tokens"] > 0
    nats, correct, tokens = (found[name][has_items] for name in ("nats", "correct", "tokens"))
    columns = {
        "score": correct / tokens,
        "nats": nats,
        "tokens": tokens.astype(np.int64),
        "correct": correct.astype(np.int64),
    }
    return {
        "accuracy": float(correct.sum() / items),
        "nll": float(nats.sum() / items),
        "majority_accuracy": float(counts.max() / items),
        "items": items,
        "predictions": by_item(columns, context.cache.rows[has_items]),
    }

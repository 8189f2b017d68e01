"""Masked language modelling: hidden tokens from both sides (Devlin et al. 2019, BERT, section 3.1).

A share of the text tokens are targets: most of them are replaced by the mask token, some by a random token, and the
rest are not changed. The draw happens on the host and depends on (seed, step, row) only.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from llm3.data.batch import Batch
from llm3.data.tokenizer import Tokenizer
from llm3.data.words import word_numbers
from llm3.errors import UserError, check_share
from llm3.models.layers import at_positions
from llm3.models.transformer import Transformer
from llm3.objectives import Sums, Task, causal

WINDOWS = {"text": "stream"}
HEAD = ""
LABELLED = False
CAUSAL = False
LONGEST_LAST_WORD = 16  # max tokens of a word that may exceed the share of a window


@dataclasses.dataclass(frozen=True)
class Options:
    """share: share of the text tokens that are targets.

    mask, replace: shares of the targets that are replaced by the mask token and by a random token.
    whole_words: all tokens of a word are targets, or none (as in BERT's later models; Cui et al. 2021 for Chinese);
    `llm3.data.words` defines words.
    """

    share: float = 0.15
    mask: float = 0.8
    replace: float = 0.1
    whole_words: bool = False

    def __post_init__(self) -> None:
        check_share("share", self.share)
        for name in ("mask", "replace"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}={getattr(self, name)!r}: expected a share from 0 to 1")
        if self.mask + self.replace > 1 + 1e-9:
            raise UserError(f"mask={self.mask!r} and replace={self.replace!r}: expected shares of at most 1 together")


def corrupt(window: Batch, rng: np.random.Generator, task: Task) -> Batch:
    """The window with hidden tokens. Targets are the original tokens; hidden ones have weight 1, others 0."""
    options, tokens = task.options, window.tokens
    hidden = choose(window, options.share, options.whole_words, rng, task.tokenizer)
    action, random = rng.random(len(tokens)), rng.choice(text_tokens(task.tokenizer), len(tokens))
    changed = np.where(action < options.mask, task.tokenizer.need_mask(), random)
    changed = np.where(action < options.mask + options.replace, changed, tokens)
    changed = np.where(hidden, changed, tokens).astype(tokens.dtype)
    return window._replace(tokens=changed, targets=tokens, weights=hidden.astype(np.float32))


def check_tokenizer(tokenizer: Tokenizer, options: Options) -> None:
    """Raise UserError if there is no mask token."""
    tokenizer.need_mask()


def choose(
    window: Batch, share: float, whole_words: bool, rng: np.random.Generator, tokenizer: Tokenizer
) -> np.ndarray:
    """Choose the tokens to predict: bool [T], on average `share` of the text tokens, never a special token.

    Tokens (or words) are taken in random order up to that share. The one that would exceed it is taken with the
    probability that makes the average exact, unless it is a word of more than `LONGEST_LAST_WORD` tokens.
    """
    text = (window.segments > 0) & tokenizer.is_text[window.tokens]
    positions = np.flatnonzero(text)
    words = word_numbers(window.tokens, window.segments, tokenizer)[positions] if whole_words else positions
    names, word = np.unique(words, return_inverse=True)
    order = rng.permutation(len(names))
    sizes = np.bincount(word, minlength=len(names))[order]
    left = share * len(positions) - (np.cumsum(sizes) - sizes)  # tokens left of the share before each word
    taken = (sizes <= left) | ((sizes <= LONGEST_LAST_WORD) & (rng.random() * sizes < left))
    chosen = np.zeros(len(names), bool)
    chosen[order] = taken
    hidden = np.zeros(len(text), bool)
    hidden[positions] = chosen[word]
    return hidden


def max_output_positions(task: Task) -> int:
    """The max number of targets in a window."""
    share = math.ceil(task.options.share * task.length)
    return min(task.length, share + (LONGEST_LAST_WORD - 1 if task.options.whole_words else 0))


@functools.lru_cache(maxsize=8)
def text_tokens(tokenizer: Tokenizer) -> np.ndarray:
    """The tokens that encode text, without special tokens: int32 [n]."""
    return np.flatnonzero(tokenizer.byte_lengths).astype(np.int32)


def loss(model: Transformer, batch: Batch, key: jax.Array, task: Task) -> Sums:
    """The sum of the losses of the hidden tokens, weighted by token.

    If the model has `max_output_positions`, its last layer and logits are computed for the hidden tokens only.
    """
    if not model.config.max_output_positions:
        return causal.loss(model, batch, key, task)
    output_positions = jax.lax.top_k(batch.weights, model.config.max_output_positions)[1]
    hidden = model(batch.tokens, batch.positions, batch.segments, key=key, output_positions=output_positions)
    targets, weights = (at_positions(x, output_positions, 1) for x in (batch.targets, batch.weights))
    nats, _ = model.score(hidden, targets)
    return Sums(jnp.sum(nats * weights), jnp.sum(weights), {})

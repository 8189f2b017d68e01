"""Multiple choice by likelihood: the choice that the model finds most likely after the prompt.

Prompt and choice are encoded jointly; a choice's tokens begin with the first one that holds a byte of it. A choice is
judged by the sum of their log-probabilities; by that per character (Gao 2021, "Multiple choice normalization in LM
evaluation"); and by what the prompt adds to it over a neutral one (Brown et al. 2020, section 2.4).
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llm3.data.chat_templates import Pieces
from llm3.data.formats.choice import encode_choice
from llm3.data.tokenizer import Tokenizer
from llm3.distributed.sharding import constrain
from llm3.errors import UserError
from llm3.evals import EvalContext
from llm3.models.decoding import groups, read, right_aligned
from llm3.models.transformer import Transformer

WINDOWS = {"choice": "dialogue"}
HEAD = ""
CAUSAL = True
BETTER = {
    "accuracy": "higher",
    "per_character_accuracy": "higher",
    "unconditional_accuracy": "higher",
    "macro_f1": "higher",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """neutral: the text before a choice by which its likelihood without the prompt is measured."""

    neutral: str = "Answer:"


class Item(NamedTuple):
    """A question as tokens. prompt: what stands before all choices, without its last token. tails: that one and the
    rest, of each choice. firsts: where in its tail each choice begins.
    """

    prompt: list[int]
    tails: list[list[int]]
    firsts: list[int]
    truncated: bool


def encode(prompt: Pieces, choices: list[str], tokenizer: Tokenizer, length: int) -> Item:
    """A prompt and its choices. Of more than `length` predictions the last ones are kept, behind <bos>.

    Raises UserError for a choice that is too long.
    """
    found = [encode_choice(prompt, choice, tokenizer) for choice in choices]
    common = min(first for _, first in found)
    common = next((n for n in range(common) if len({tokens[n] for tokens, _ in found}) > 1), common)
    cut = max(0, max(len(tokens) for tokens, _ in found) - length - 1)
    if cut and cut > common - 2:
        raise UserError(
            f"evaluation 'choice': sequence_length={length}: expected room for something of the prompt and the choice "
            f"{max(choices, key=len)[:40]!r}"
        )
    shared = found[0][0]
    return Item(
        prompt=[shared[0], *shared[cut + 1 : common]][:-1],
        tails=[tokens[common - 1 :] for tokens, _ in found],
        firsts=[first - common + 1 for _, first in found],
        truncated=cut > 0,
    )


def nats(
    model: Transformer,
    prompts: jax.Array,
    lengths: jax.Array,
    tokens: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    choices: int,
) -> dict[str, jax.Array]:
    """Minus the log-likelihood of each choice: float32 [B, K]. The prompt, which they share, is read once.

    prompts, lengths: as of `decoding.right_aligned`; tokens, targets: int32 [B, K C]; weights: float32 [B, K C], 1 at
    the tokens of the choice.
    """
    size = tokens.shape[1] // choices
    _, kept = read(model, prompts, lengths, size)
    positions = lengths + jnp.arange(size, dtype=jnp.int32)

    def one(part: tuple) -> jax.Array:
        tokens, targets, weights = part
        hidden, _ = model(tokens, positions, jnp.ones_like(tokens), kept)
        losses = optax.softmax_cross_entropy_with_integer_labels(model.logits(hidden), targets)
        return jnp.sum(losses * weights, axis=1)

    parts = [each.reshape(-1, choices, size).swapaxes(0, 1) for each in (tokens, targets, weights)]
    return {"nats": constrain(jax.lax.map(one, tuple(parts)).T, None, None)}


def log_likelihoods(context: EvalContext, items: list[Item]) -> list[np.ndarray]:
    """The sum of the log-probabilities of the tokens of each choice: float64 [choices] for each item."""
    choices = max(len(each.tails) for each in items)
    size = max(len(tail) for each in items for tail in each.tails) - 1
    run, rows = context.jit(functools.partial(nats, choices=choices)), context.config.batch_size
    result = [np.empty(0)] * len(items)
    lengths = [len(each.prompt) for each in items]
    for width, numbers in groups(lengths, context.config.sequence_length, rows):
        chosen = [items[number] for number in numbers]
        prompts = right_aligned([each.prompt for each in chosen], width, rows)
        found = jax.device_get(run(*context.place((*prompts, *_arrays(chosen, rows, choices, size)))))["nats"]
        for row, (number, each) in enumerate(zip(numbers, chosen, strict=True)):
            result[number] = -found[row, : len(each.tails)].astype(np.float64)
    return result


def _arrays(items: list[Item], rows: int, choices: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """tokens, targets and weights of `nats`."""
    tokens, targets = np.zeros((2, rows, choices, size), np.int32)
    weights = np.zeros((rows, choices, size), np.float32)
    for row, item in enumerate(items):
        for place, (tail, first) in enumerate(zip(item.tails, item.firsts, strict=True)):
            tokens[row, place, : len(tail) - 1] = tail[:-1]
            targets[row, place, : len(tail) - 1] = tail[1:]
            weights[row, place, first - 1 : len(tail) - 1] = 1
    return tuple(each.reshape(rows, -1) for each in (tokens, targets, weights))


def judged(context: EvalContext, notes: list[dict[str, Any]]) -> tuple[dict[str, list[np.ndarray]], int]:
    """How good each choice of each item is by each way to judge, and of how many items the prompt was cut."""

    def encoded(prompt: Pieces, choices: Sequence[str]) -> Item:
        return encode(prompt, list(choices), context.tokenizer, context.config.sequence_length)

    plain = [(_neutral(note["prompt"], context.options.neutral), tuple(note["choices"])) for note in notes]
    distinct = sorted(set(plain))
    unasked = [encoded([Tokenizer.bos_id, text], choices) for text, choices in distinct]
    asked = [encoded(note["prompt"], note["choices"]) for note in notes]
    prior = dict(zip(distinct, log_likelihoods(context, unasked), strict=True))
    given = log_likelihoods(context, asked)
    sizes = [np.array([len(choice) for choice in note["choices"]]) for note in notes]
    return {
        "accuracy": given,
        "per_character_accuracy": [a / b for a, b in zip(given, sizes, strict=True)],
        "unconditional_accuracy": [a - prior[b] for a, b in zip(given, plain, strict=True)],
    }, sum(each.truncated for each in asked)


def evaluate(context: EvalContext) -> dict[str, Any]:
    """accuracy, per_character_accuracy and unconditional_accuracy, of the three ways to judge.

    majority_accuracy: of the number that is right most often in this very set. macro_f1: of `accuracy`, over the
    choices that occur, where all items have the same. items: their number; truncated: of those, how many had a prompt
    that did not fit, so that its beginning is left out.
    """
    notes = [context.cache.note(index) for index in range(context.cache.documents)]
    correct = np.array([note["correct"] for note in notes])
    scores, truncated = judged(context, notes)
    chosen = {name: np.array([int(np.argmax(each)) for each in lists]) for name, lists in scores.items()}
    result: dict[str, Any] = {name: float(np.mean(each == correct)) for name, each in chosen.items()}
    if all(note["choices"] == notes[0]["choices"] for note in notes):
        result["macro_f1"] = macro_f1(correct, chosen["accuracy"])
    majority = float(np.bincount(correct).max() / len(notes))
    return result | {"majority_accuracy": majority, "items": len(notes), "truncated": truncated}


def _neutral(prompt: Pieces, text: str) -> str:
    """The neutral text, with the white space that the prompt ends with: a choice's first token often holds it."""
    last = prompt[-1] if isinstance(prompt[-1], str) else ""
    return text + last[len(last.rstrip()) :]


def macro_f1(correct: np.ndarray, chosen: np.ndarray) -> float:
    """The mean of the F1 of each class that occurs, in truth or prediction."""
    classes = np.union1d(correct, chosen)
    hits = [2 * np.sum((correct == each) & (chosen == each)) for each in classes]
    seen = [np.sum(correct == each) + np.sum(chosen == each) for each in classes]
    return float(np.mean(np.array(hits) / np.array(seen)))

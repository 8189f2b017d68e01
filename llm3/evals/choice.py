"""Multiple choice by likelihood: the model's answer is the choice with the highest score.

Prompt and choice are encoded jointly; the tokens of a choice begin with the first one that contains a byte of it. There
are three scores: the sum of the log-probabilities of these tokens; that sum per character (Gao 2021, "Multiple choice
normalization in LM evaluation"); and that sum minus the sum after a neutral prompt (Brown et al. 2020, section 2.4).
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from llm3.data.formats.choice import encode_choice
from llm3.data.tokenizer import Pieces, Tokenizer
from llm3.distributed.sharding import constrain
from llm3.errors import UserError
from llm3.evals import EvalContext, by_item, overlapped
from llm3.models.batching import left_aligned
from llm3.models.incremental import read
from llm3.models.kv_cache import make_cache
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
    """neutral: the neutral prompt, from which the likelihood of a choice without its prompt is computed."""

    neutral: str = "Answer:"


class Item(NamedTuple):
    """A question as tokens.

    prompt: the tokens that all choices share, without the last of them. tails: for each choice, that last shared token
    and all later ones. firsts: for each choice, the index of its first token in its tail.
    """

    prompt: list[int]
    tails: list[list[int]]
    firsts: list[int]
    truncated: bool


def encode(prompt: Pieces, choices: list[str], tokenizer: Tokenizer, length: int, *, joint: bool = False) -> Item:
    """Encode a prompt and its choices. Only the last `length` predictions are kept, after <bos>. joint: see the format.

    Raises UserError for a choice that is too long.
    """
    found = [encode_choice(prompt, choice, tokenizer, joint=joint) for choice in choices]
    common = min(first for _, first in found)
    common = next((n for n in range(common) if len({tokens[n] for tokens, _ in found}) > 1), common)
    cut = max(0, max(len(tokens) for tokens, _ in found) - length - 1)
    if cut and cut > common - 2:
        raise UserError(
            f"evaluation 'choice': sequence_length={length}: expected room for a part of the prompt and the choice "
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
    """Negative log-likelihood of each choice, float32 [B, K]. The model reads the shared prompt once.

    prompts, lengths: see `batching.left_aligned`. tokens, targets: int32 [B, K C]. weights: float32 [B, K C], 1 at the
    tokens of a choice.
    """
    (rows, width), size = prompts.shape, tokens.shape[1] // choices
    empty = make_cache(model.config, ((0, model.config.layers),), rows, width + size, size)
    _, cache = read(model, prompts, lengths, empty, first=True)

    def one(part: tuple) -> jax.Array:
        tokens, targets, weights = part
        hidden, _ = read(model, tokens, jnp.full(rows, size), cache)
        return jnp.sum(model.score(hidden, targets)[0] * weights, axis=1)

    parts = [each.reshape(-1, choices, size).swapaxes(0, 1) for each in (tokens, targets, weights)]
    return {"nats": constrain(jax.lax.map(one, tuple(parts)).T, None, None)}


def log_likelihoods(context: EvalContext, items: list[Item]) -> list[np.ndarray]:
    """The log-likelihood of each choice: float64 [choices] for each item."""
    choices = max(len(each.tails) for each in items)
    size = max(len(tail) for each in items for tail in each.tails) - 1
    run, rows = context.jit(functools.partial(nats, choices=choices)), context.config.batch_size
    result = [np.empty(0)] * len(items)
    lengths = [len(each.prompt) for each in items]

    def computed() -> Iterator[tuple[list[int], Any]]:
        for width, numbers in context.groups(lengths, context.config.sequence_length):
            chosen = [items[number] for number in numbers]
            prompts = left_aligned([each.prompt for each in chosen], width, rows)
            yield numbers, run(*context.place((*prompts, *_arrays(chosen, rows, choices, size))))

    for numbers, found in overlapped(computed()):
        for row, number in enumerate(numbers):
            result[number] = -found["nats"][row, : len(items[number].tails)].astype(np.float64)
    return result


def _arrays(items: list[Item], rows: int, choices: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The tokens, targets and weights for `nats`."""
    tokens, targets = np.zeros((2, rows, choices, size), np.int32)
    weights = np.zeros((rows, choices, size), np.float32)
    for row, item in enumerate(items):
        for column, (tail, first) in enumerate(zip(item.tails, item.firsts, strict=True)):
            tokens[row, column, : len(tail) - 1] = tail[:-1]
            targets[row, column, : len(tail) - 1] = tail[1:]
            weights[row, column, first - 1 : len(tail) - 1] = 1
    return tokens.reshape(rows, -1), targets.reshape(rows, -1), weights.reshape(rows, -1)


def score_choices(context: EvalContext, notes: list[dict[str, Any]]) -> tuple[dict[str, list[np.ndarray]], int]:
    """{metric: the scores of the choices of each item}, and the number of items whose prompt was cut."""

    def encoded(prompt: Pieces, choices: Sequence[str], joint: bool = False) -> Item:
        return encode(prompt, list(choices), context.tokenizer, context.config.sequence_length, joint=joint)

    plain = [(_neutral(note["prompt"], context.options.neutral), tuple(note["choices"])) for note in notes]
    distinct = sorted(set(plain))
    unasked = [encoded([context.tokenizer.prefix_id, text], choices) for text, choices in distinct]
    asked = [encoded(note["prompt"], note["choices"], note.get("joint", False)) for note in notes]
    prior = dict(zip(distinct, log_likelihoods(context, unasked), strict=True))
    given = log_likelihoods(context, asked)
    sizes = [np.array([len(choice) for choice in note["choices"]]) for note in notes]
    return {
        "accuracy": given,
        "per_character_accuracy": [a / b for a, b in zip(given, sizes, strict=True)],
        "unconditional_accuracy": [a - prior[b] for a, b in zip(given, plain, strict=True)],
    }, sum(each.truncated for each in asked)


def evaluate(context: EvalContext) -> dict[str, Any]:
    """accuracy, per_character_accuracy and unconditional_accuracy: by each of the three scores.

    majority_accuracy: accuracy of always answering the choice number that is right most often in this set. macro_f1: by
    the same score as `accuracy`, over the choices that occur; only if all items have the same choices. items: their
    number. truncated: the number of items whose prompt lost its beginning because it did not fit.
    """
    notes = context.notes()
    correct = np.array([note["correct"] for note in notes])
    scores, truncated = score_choices(context, notes)
    chosen = {name: np.array([int(np.argmax(each)) for each in lists]) for name, lists in scores.items()}
    result: dict[str, Any] = {name: float(np.mean(each == correct)) for name, each in chosen.items()}
    if all(note["choices"] == notes[0]["choices"] for note in notes):
        result["macro_f1"] = macro_f1(correct, chosen["accuracy"])
    majority = float(np.bincount(correct).max() / len(notes))
    result |= {"majority_accuracy": majority, "items": len(notes), "truncated": truncated}
    right = {name: (each == correct).astype(np.float64) for name, each in chosen.items()}
    columns = _columns(notes, correct, chosen["accuracy"], scores["accuracy"]) | {"score": right.pop("accuracy")}
    return result | {"predictions": by_item(columns | right, context.cache.rows)}


def _columns(
    notes: list[dict[str, Any]], correct: np.ndarray, chosen: np.ndarray, given: list[np.ndarray]
) -> dict[str, Any]:
    """Columns of predictions. given: the log-likelihoods of the choices of each item."""
    shares = [scipy.special.softmax(each) for each in given]
    return {
        "truth": [note["choices"][number] for note, number in zip(notes, correct, strict=True)],
        "prediction": [note["choices"][number] for note, number in zip(notes, chosen, strict=True)],
        "nats": np.array([-each[number] for each, number in zip(given, correct, strict=True)]),
        "confidence": np.array([each[number] for each, number in zip(shares, chosen, strict=True)]),
        "log_likelihoods": given,
    }


def _neutral(prompt: Pieces, text: str) -> str:
    """The neutral text plus the white space at the end of the prompt, often part of the first token of a choice."""
    last = prompt[-1] if isinstance(prompt[-1], str) else ""
    return text + last[len(last.rstrip()) :]


def macro_f1(correct: np.ndarray, chosen: np.ndarray) -> float:
    """The mean F1 of the classes that occur in truth or prediction."""
    classes = np.union1d(correct, chosen)
    hits = [2 * np.sum((correct == each) & (chosen == each)) for each in classes]
    seen = [np.sum(correct == each) + np.sum(chosen == each) for each in classes]
    return float(np.mean(np.array(hits) / np.array(seen)))

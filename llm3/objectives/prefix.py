"""Prefix language modelling and mixtures of denoisers, on a causal model.

A prefix LM attends in both directions within the first part of a document and predicts the rest token by token (Liu et
al. 2018, section 4.2.3; Raffel et al. 2020, T5, section 3.2.1). A span denoiser (T5, section 3.1.4) reads a document in
which each span is replaced by one mask token, and predicts the spans: mask, span, mask, span, ..., end. All masks are
the same token; their order identifies the spans. UL2 (Tay et al. 2022, section 3.1) mixes several denoisers; a text at
the beginning of a document, its mode, names the denoiser.

The denoiser of each document is drawn on the host and applied to that document alone. Every position of a document may
attend to its prefix: the positions up to the one that predicts the first target.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm3.data.batch import Batch
from llm3.data.packing import empty_window, mark_segment
from llm3.data.tokenizer import Tokenizer
from llm3.errors import UserError, nearest
from llm3.models.transformer import Transformer
from llm3.objectives import Sums, Task

WINDOWS = {"text": "stream"}
HEAD = ""
LABELLED = False
CAUSAL = True
PREFIX = True
SHORTEST = 32  # tokens; a shorter document must not grow: it gets no mode, and T5's prefix LM instead of spans

# denoisers="ul2": Table 1 of Tay et al. 2022, all equally likely (section 3.1.2)
UL2 = (
    {"kind": "span", "mean_length": 3, "share": 0.15, "mode": "[R]"},
    {"kind": "span", "mean_length": 8, "share": 0.15, "mode": "[R]"},
    {"kind": "prefix", "share": 0.25, "mode": "[S]"},
    {"kind": "span", "mean_length": 3, "share": 0.5, "mode": "[X]"},
    {"kind": "span", "mean_length": 8, "share": 0.5, "mode": "[X]"},
    {"kind": "span", "mean_length": 64, "share": 0.15, "mode": "[X]"},
    {"kind": "span", "mean_length": 64, "share": 0.5, "mode": "[X]"},
)


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """One way to make inputs and targets of a document.

    kind: "prefix": predict the last tokens; "span": predict spans. share: mean share of the tokens to predict. "prefix"
    draws the share uniformly from the widest interval around it (0.5: all splits are equally likely, T5's prefix LM;
    1: causal language modelling). mean_length: mean tokens per span; a little more in short documents. weight: relative
    probability of this denoiser. mode: text at the beginning of the document; "": none.
    """

    kind: str = "prefix"
    share: float = 0.5
    mean_length: float = 3.0
    weight: float = 1.0
    mode: str = ""

    def __post_init__(self) -> None:
        if self.kind not in ("prefix", "span"):
            raise UserError(f"denoisers.*.kind={self.kind!r}: {nearest(self.kind, ('prefix', 'span'))}")
        if not 0 < self.share <= 1:
            raise UserError(f"denoisers.*.share={self.share!r}: expected a share above 0, up to 1")
        if not self.mean_length >= 1:
            raise UserError(f"denoisers.*.mean_length={self.mean_length!r}: expected at least 1 token")
        if self.kind == "span" and self.share * (1 + 1 / self.mean_length) > 1:
            largest = self.mean_length / (self.mean_length + 1)
            raise UserError(
                f"denoisers.*.share={self.share!r}: spans of {self.mean_length} tokens would touch; expected at most "
                f"{largest:.3g}"
            )
        if not self.weight > 0:
            raise UserError(f"denoisers.*.weight={self.weight!r}: expected a number above 0")


@dataclasses.dataclass(frozen=True)
class Options:
    """denoisers: dicts with the fields of `Denoiser`, or "ul2" for `UL2`. The default is T5's prefix LM."""

    denoisers: Any = ({"kind": "prefix", "share": 0.5},)

    def __post_init__(self) -> None:
        given = UL2 if self.denoisers == "ul2" else self.denoisers
        if not given or isinstance(given, str):
            raise UserError(f"denoisers={given!r}: expected a list with at least one, or 'ul2'")
        object.__setattr__(self, "denoisers", tuple(map(_read_denoiser, given)))


def _read_denoiser(given: Any) -> Denoiser:
    names = [field.name for field in dataclasses.fields(Denoiser)]
    if not isinstance(given, Mapping):
        raise UserError(f"denoisers: {given!r}: expected a dict with some of {', '.join(names)}")
    for name in given:
        if name not in names:
            raise UserError(f"denoisers.*.{name}: no such field; {nearest(name, names)}")
    return Denoiser(**given)


def raw_length(task: Task) -> int:
    """The text tokens in a window of task.length, such that every window fits, whichever denoisers are drawn.

    A document of at least `SHORTEST` tokens grows by its mode, and by two tokens a span (one mask in the input, one in
    the targets); a shorter one does not grow. Unused positions are padding: none with the default options, about a
    fifth of most windows with `UL2`.
    """

    def growth(denoiser: Denoiser) -> float:
        spans = max(1 / SHORTEST, denoiser.share / denoiser.mean_length) if denoiser.kind == "span" else 0
        return len(_mode(task.tokenizer, denoiser.mode)) / SHORTEST + 2 * spans

    return int(task.length / (1 + max(map(growth, task.options.denoisers))))


def check_tokenizer(tokenizer: Tokenizer, options: Options) -> None:
    """Raise UserError if a denoiser of spans finds no mask token."""
    if any(each.kind == "span" for each in options.denoisers):
        tokenizer.need_mask()


def corrupt(window: Batch, rng: np.random.Generator, task: Task) -> Batch:
    """Apply a random denoiser to each document of a window of `raw_length` tokens: a window of task.length.

    Segments keep their numbers; positions start at 0 in each.
    """
    denoisers, result, stop = task.options.denoisers, empty_window(task.length), 0
    weights = np.array([each.weight for each in denoisers])
    for segment in np.unique(window.segments[window.segments > 0]):
        here = np.flatnonzero(window.segments == segment)
        tokens, last = window.tokens[here], here[-1]
        if window.weights[last]:  # the window cuts the document: its next token is a target
            tokens = np.append(tokens, window.targets[last])
        denoiser = denoisers[rng.choice(len(denoisers), p=weights / weights.sum())]
        if len(here) < SHORTEST:
            denoiser = dataclasses.replace(denoiser, mode="") if denoiser.kind == "prefix" else Denoiser()
        if denoiser.kind == "span":
            sequence, given = _spans(tokens[: len(here)], denoiser, rng, task.tokenizer)
        else:
            sequence, given = _split_prefix(tokens, denoiser, rng, task.tokenizer)
        start, stop = stop, stop + len(sequence) - 1
        destination = slice(start, stop)
        result.tokens[destination], result.targets[destination] = sequence[:-1], sequence[1:]
        result.weights[start + given - 1 : stop] = 1
        mark_segment(result, destination, int(segment))
    return result


def _split_prefix(
    tokens: np.ndarray, denoiser: Denoiser, rng: np.random.Generator, tokenizer: Tokenizer
) -> tuple[np.ndarray, int]:
    """A document with its mode, and the number of its tokens that are input; the rest are targets."""
    available = len(tokens) - 1
    low, width = max(0.0, 2 * denoiser.share - 1) * available, (1 - abs(2 * denoiser.share - 1)) * available
    predicted = min(available, int(low + rng.random() * width) + 1)
    sequence = _with_mode(tokens, denoiser, tokenizer)
    return sequence, len(sequence) - predicted


def _spans(
    tokens: np.ndarray, denoiser: Denoiser, rng: np.random.Generator, tokenizer: Tokenizer
) -> tuple[np.ndarray, int]:
    """(input, then targets; length of the input). The input has the mode, and masks in place of the spans."""
    first, last = int(tokens[0] == tokenizer.bos_id), len(tokens) - int(tokens[-1] == tokenizer.eos_id)
    expected = denoiser.share * (last - first)
    spans = max(1, int(expected / denoiser.mean_length))
    hidden = max(1, int(expected + rng.random()))
    starts, sizes = _draw_spans(last - first, hidden, spans, rng)
    text, targets = _infilled(tokens[first:last], starts, sizes, tokenizer.need_mask())
    given = _with_mode(np.concatenate([tokens[:first], text, tokens[last:]]), denoiser, tokenizer)
    return np.concatenate([given, targets, [tokenizer.eos_id]]), len(given)


def _with_mode(tokens: np.ndarray, denoiser: Denoiser, tokenizer: Tokenizer) -> np.ndarray:
    return np.insert(tokens, int(tokens[0] == tokenizer.bos_id), _mode(tokenizer, denoiser.mode))


@functools.lru_cache(maxsize=64)
def _mode(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text))


def _draw_spans(length: int, hidden: int, spans: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Starts and sizes, int64 [spans], of spans that cover `hidden` of `length` tokens; no two touch.

    Uniform over all such spans. Needs spans <= hidden and spans <= length - hidden + 1.
    """
    sizes = _parts(hidden, spans, rng)
    gaps = _parts(length - hidden + 2, spans + 1, rng)  # one extra token at both ends, so that no gap is empty
    return np.cumsum(gaps[:-1]) - 1 + np.cumsum(sizes) - sizes, sizes


def _parts(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """Positive integers that sum to `total`, int64 [parts], uniform over all such sequences."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=total)


def _infilled(tokens: np.ndarray, starts: np.ndarray, sizes: np.ndarray, mask: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens with one mask in place of each span; and the spans, each after a mask."""
    change = np.zeros(len(tokens) + 1, np.int64)
    change[starts], change[starts + sizes] = 1, -1
    hidden = np.cumsum(change[:-1]) > 0
    text = tokens.copy()
    text[starts] = mask
    return text[~hidden | (change[:-1] > 0)], np.insert(tokens[hidden], np.cumsum(sizes) - sizes, mask)


def prefix_of(batch: Batch) -> jax.Array:
    """The prefix of each document, bool [B, T]: its positions up to the first one with a weight."""
    weighted = (batch.weights > 0).astype(jnp.int32)
    before = jnp.cumsum(weighted, axis=1) - weighted
    new = jnp.pad(batch.segments[:, 1:] != batch.segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    at_start = jax.lax.cummax(jnp.where(new, before, 0), axis=1)
    return before == at_start


def loss(model: Transformer, batch: Batch, key: jax.Array, task: Task) -> Sums:
    """The sum of the losses of the targets, weighted by token."""
    del task
    hidden = model(batch.tokens, batch.positions, batch.segments, key=key, prefix=prefix_of(batch))
    nats, _ = model.score(hidden, batch.targets)
    return Sums(jnp.sum(nats * batch.weights), jnp.sum(batch.weights), {})

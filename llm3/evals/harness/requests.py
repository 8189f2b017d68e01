"""Log-likelihoods of given tokens, and generated answers, for many requests in batches on the mesh."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm3.evals import EvalContext, overlapped
from llm3.evals.generation import generate_tokens
from llm3.models.batching import Request, padded_width
from llm3.models.transformer import Transformer

STEP = 32  # tokens that are generated between two looks at the stop strings
MIN_TARGETS = 8  # least targets of a padded row
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # lm-eval's names, the first wins


class Continuation(NamedTuple):
    """Tokens to score: `tokens` follow `context`."""

    context: Sequence[int]
    tokens: Sequence[int]


class Answering(NamedTuple):
    """How to generate an answer: its max tokens, and the texts that end it."""

    tokens: int
    stops: list[str]


def answering(settings: Mapping[str, Any], default: int) -> Answering:
    """lm-eval's settings of generation. default: the max tokens where they name none."""
    stops = settings.get("until") or []
    given = (settings[name] for name in LENGTHS if settings.get(name) is not None)
    return Answering(
        int(next(given, default)), [each for each in ([stops] if isinstance(stops, str) else stops) if each]
    )


def token_nats(
    model: Transformer, tokens: jax.Array, segments: jax.Array, at: jax.Array, targets: jax.Array
) -> dict[str, jax.Array]:
    """The negative log-likelihood of each target, and whether it is the likeliest token: float32 [B, N] both.

    tokens, segments: int32 [B, T], see `Batch`. at: int32 [B, N], the positions that predict the targets, int32 [B, N].
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    hidden = model(tokens, positions, segments)
    nats, right = model.score(jnp.take_along_axis(hidden, at[..., None], axis=1), targets)
    return {"nats": nats, "right": right}


def log_likelihoods(context: EvalContext, items: Sequence[Continuation]) -> list[tuple[float, bool]]:
    """(log-likelihood, whether greedy decoding gives these tokens) of each item, which has 1 to sequence_length tokens.

    Only the last tokens that fit a window are read.
    """
    length, rows, run = context.config.sequence_length, context.config.batch_size, context.jit(token_nats)
    read = [[*each.context, *each.tokens][-length - 1 :][:-1] for each in items]
    result = [(0.0, False)] * len(items)

    def computed() -> Iterator[tuple[list[int], Any]]:
        for width, numbers in context.groups([len(each) for each in read], length, unit="requests"):
            scored = [items[number].tokens for number in numbers]
            tokens, segments = np.zeros((2, rows, width), np.int32)
            at, targets = np.zeros((2, rows, padded_width(max(map(len, scored)), width, MIN_TARGETS)), np.int32)
            for row, (number, target) in enumerate(zip(numbers, scored, strict=True)):
                last = len(read[number])
                tokens[row, :last], segments[row, :last] = read[number], 1
                at[row, : len(target)], targets[row, : len(target)] = np.arange(last - len(target), last), target
            yield numbers, run(*context.place((tokens, segments, at, targets)))

    for numbers, found in overlapped(computed()):
        for row, number in enumerate(numbers):
            count = len(items[number].tokens)
            nats, right = (found[name][row, :count].astype(np.float64) for name in ("nats", "right"))
            result[number] = (-float(nats.sum()), bool(right.all()))
    return result


def answers(
    context: EvalContext, prompts: Sequence[Sequence[int]], limits: Sequence[Answering], end: Sequence[int]
) -> list[str]:
    """The greedy answer to each prompt, without the stop string, the end token or the tokens `end` that end it.

    A prompt and the tokens of its answer must fit sequence_length. A stop string may begin and end within tokens, so it
    is looked for in the text, after every `STEP` tokens.
    """
    stops = [*([each] for each in context.tokenizer.end_ids), end]
    asked = [Request(each, limit.tokens, stops) for each, limit in zip(prompts, limits, strict=True)]

    def text(number: int, tokens: Sequence[int]) -> tuple[str, bool]:
        return _cut(context.tokenizer.decode(tokens), limits[number].stops)

    made = generate_tokens(
        context,
        asked,
        context.config.sequence_length,
        unit="requests",
        steps=STEP,
        ended=lambda number, tokens: text(number, tokens)[1],
    )
    return [text(number, tokens)[0] for number, tokens in enumerate(made)]


def _cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before the first stop string, and whether there was one."""
    cut = text
    for stop in stops:
        cut = cut.split(stop)[0]
    return cut, cut != text

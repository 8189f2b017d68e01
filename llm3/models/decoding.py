"""Sampling and greedy decoding with a key-value cache."""

import collections
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llm3.config.model_schema import ModelConfig, check_length
from llm3.distributed.sharding import constrain
from llm3.models.transformer import Transformer, abstract, make_cache
from llm3.segments import segmented

MIN_WIDTH = 32  # least tokens of a padded row of prompts


def next_token(
    logits: jax.Array, key: jax.Array, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> jax.Array:
    """Sample a token for each row of logits: float32 [B, V] to int32 [B].

    temperature 0: the most likely token. top_k > 0 keeps the k most likely (Fan et al. 2018); top_p < 1 keeps the
    smallest set of most likely tokens whose probability reaches p (nucleus sampling, Holtzman et al. 2020). Of equally
    likely tokens, both prefer those with smaller numbers, as temperature 0 does.
    """
    if temperature == 0:
        return jnp.argmax(logits, axis=-1)
    # 0 for the most likely token, which stays finite; float32 has no temperature below its least normal number
    below = logits - jnp.max(logits, axis=-1, keepdims=True)
    logits = below / max(temperature, float(jnp.finfo(jnp.float32).tiny))
    if top_k or top_p < 1:
        ordered, order = jax.lax.top_k(logits, min(top_k or logits.shape[-1], logits.shape[-1]))
        share = jax.nn.softmax(ordered)
        kept = (jnp.cumsum(share, axis=-1) - share < top_p) | (top_p >= 1)
        allowed = jnp.put_along_axis(jnp.zeros(logits.shape, bool), order, kept, axis=-1, inplace=False)
        logits = jnp.where(allowed, logits, -jnp.inf)
    return jax.random.categorical(key, logits)


@cache
def make_advance(config: ModelConfig, temperature: float, top_k: int, top_p: float) -> Callable:
    """A jitted advance(params, cache, tokens [B, T], key) -> (cache, next token [B]). The cache is donated."""
    graph = abstract(config).graph

    @partial(jax.jit, donate_argnums=1)
    def advance(params: dict, cache: dict, tokens: jax.Array, key: jax.Array) -> tuple[dict, jax.Array]:
        positions = cache["index"] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        model = nnx.merge(graph, params)
        hidden, cache = model(tokens, positions, jnp.ones_like(tokens), cache)
        logits = model.logits(hidden[:, -1:])[:, 0]
        return cache, next_token(logits, key, temperature=temperature, top_k=top_k, top_p=top_p)

    return advance


def sample(
    params: dict,
    config: ModelConfig,
    prompt: list[int],
    *,
    max_tokens: int,
    seed: int = 0,
    stops: Sequence[Sequence[int]] = (),
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> list[int]:
    """Up to `max_tokens` tokens after the prompt, up to the first of `stops`, runs of tokens. params: canonical.

    Raises UserError if a model with learned positions has none for so many tokens.
    """
    check_length(config, len(prompt) + max_tokens, "prompt and max_tokens")
    advance = make_advance(config, temperature, top_k, top_p)
    params = segmented(params, ((0, config.layers),))
    # leaves of a new cache may share a buffer, and a buffer can be donated only once
    kv = jax.tree.map(jnp.copy, make_cache(config, 1, len(prompt) + max_tokens))
    tokens, keys, result = jnp.array([prompt], jnp.int32), jax.random.key(seed), []
    for i in range(max_tokens):
        kv, token = advance(params, kv, tokens, jax.random.fold_in(keys, i))
        result.append(int(token[0]))
        if ends := [len(stop) for stop in stops if stop and result[-len(stop) :] == list(stop)]:
            return result[: -max(ends)]
        tokens = token[:, None].astype(jnp.int32)
    return result


def padded_width(length: int, max_width: int, least: int = MIN_WIDTH) -> int:
    """The next power of two, at least `least`, capped at `max_width`."""
    return min(max_width, max(least, 1 << max(length - 1, 0).bit_length()))


def width_groups(lengths: Sequence[int], max_width: int, rows: int) -> Iterator[tuple[int, list[int]]]:
    """Yield (width, numbers) of prompts that are padded to the same width, at most `rows` at a time.

    The width is a `padded_width`; it depends on the prompt's own length only.
    """
    found: dict[int, list[int]] = collections.defaultdict(list)
    for number, length in enumerate(lengths):
        found[padded_width(length, max_width)].append(number)
    for width, numbers in sorted(found.items()):
        for first in range(0, len(numbers), rows):
            yield width, numbers[first : first + rows]


def right_aligned(prompts: Sequence[Sequence[int]], width: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-aligned prompts, int32 [rows, width], and their lengths, int32 [rows, 1]; padding rows have length 0."""
    tokens, lengths = np.zeros((rows, width), np.int32), np.zeros((rows, 1), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        lengths[row] = len(prompt)
    return tokens, lengths


def prefill(model: Transformer, prompts: jax.Array, lengths: jax.Array, max_tokens: int) -> tuple[jax.Array, dict]:
    """Hidden states [B, P, D] of right-aligned prompts, and their key-value cache, with room for `max_tokens` more."""
    width = prompts.shape[1]
    positions = jnp.arange(width, dtype=jnp.int32) - (width - lengths)
    kv = make_cache(model.config, len(prompts), width + max_tokens)
    hidden, filled = model(prompts, jnp.maximum(positions, 0), (positions >= 0).astype(jnp.int32), kv)
    assert filled is not None  # a cache was given
    return hidden, filled


def greedy(
    model: Transformer,
    prompts: jax.Array,
    lengths: jax.Array,
    ends: jax.Array,
    *,
    stops: tuple[int, ...],
    max_tokens: int,
) -> dict[str, jax.Array]:
    """`decode` with the likeliest tokens."""
    return decode(model, prompts, lengths, ends, None, stops=stops, max_tokens=max_tokens)


def decode(
    model: Transformer,
    prompts: jax.Array,
    lengths: jax.Array,
    ends: jax.Array,
    seeds: jax.Array | None,
    *,
    stops: tuple[int, ...],
    max_tokens: int,
    temperature: float = 0.0,
) -> dict[str, jax.Array]:
    """Decode after each prompt, all rows at a time: greedily, or drawn with the `seeds` of the rows, int32 [B, 1].

    prompts: int32 [B, P], lengths: int32 [B, 1]: see `right_aligned`. ends: int32 [B, L], up to L tokens that end the
    answer, right-aligned after -1; each token of `stops` ends it as well. Returns tokens, int32 [B, max_tokens], and
    count, int32 [B, 1], the number of tokens of the answer without the last one of its end; later tokens are undefined.
    The answer of a row does not depend on other rows.
    """
    real = (lengths > 0).astype(jnp.int32)

    def unfinished(state: tuple) -> jax.Array:
        step, *_, count = state
        return (step < max_tokens) & jnp.any(count == step)  # an unfinished row has one token a step

    def body(state: tuple) -> tuple:
        step, kv, token, recent, answer, count = state
        recent = jnp.concatenate([recent[:, 1:], token], axis=1)
        ended = ((recent == ends) | (ends < 0)).all(axis=-1, keepdims=True)
        for stop in stops:
            ended |= token == stop
        count += (count == step) & ~ended
        answer = jax.lax.dynamic_update_slice_in_dim(answer, token, step, 1)
        hidden, kv = model(token, lengths + step, real, kv)
        return step + 1, kv, chosen(hidden, step + 1), recent, answer, count

    def chosen(hidden: jax.Array, step: int | jax.Array) -> jax.Array:
        logits = model.logits(hidden[:, -1:])
        if seeds is None:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed[0]), step))(seeds)
        draw = partial(next_token, temperature=temperature)
        return jax.vmap(lambda row, key: draw(row, key))(logits, keys).astype(jnp.int32)

    hidden, kv = prefill(model, prompts, lengths, max_tokens)
    answer = jnp.zeros((len(prompts), max_tokens), jnp.int32)
    recent = jnp.full_like(ends, -1)  # the last tokens of each answer
    state = (jnp.int32(0), kv, chosen(hidden, 0), recent, answer, real - 1)  # a padding row is finished from the start
    *_, answer, count = jax.lax.while_loop(unfinished, body, state)
    return {"tokens": constrain(answer, None, None), "count": constrain(jnp.maximum(count, 0), None, None)}

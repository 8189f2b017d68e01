"""Greedy decoding and sampling: one loop for a batch of rows, each of which is an answer of its own.

A row's answer depends on its prompt and seed only. Prompts of different lengths share a batch, and a row that has
ended can take the next prompt: see `llm3.models.batching`.

Shapes: B rows, T length, M max tokens of an answer, E stops of a row, of up to L tokens.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llm3.config.model_schema import ModelConfig
from llm3.models.incremental import read
from llm3.models.kv_cache import Cache, make_cache
from llm3.models.transformer import Transformer
from llm3.segments import Segments

ANY, NEVER = -1, -2  # in a stop: any token or none, and no token


class Sampling(NamedTuple):
    """How a token is chosen: see `next_token`."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


GREEDY = Sampling()


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


class Rows(NamedTuple):
    """The state of a batch while it is decoded.

    answer: int32 [B, M], the tokens so far, the last of which the cache lacks. length: int32 [B], their number. limit:
    int32 [B], the most tokens. stops: int32 [B, E, L], runs of tokens that end an answer, right-aligned after `ANY`;
    `NEVER`: no stop. seeds: int32 [B]. active: bool [B], whether the answer goes on.
    """

    cache: Cache
    answer: jax.Array
    length: jax.Array
    limit: jax.Array
    stops: jax.Array
    seeds: jax.Array
    active: jax.Array


@partial(jax.jit, static_argnames=("config", "segments", "rows", "capacity", "max_tokens", "stops"))
def no_rows(
    config: ModelConfig, segments: Segments, rows: int, capacity: int, max_tokens: int, stops: tuple[int, int]
) -> Rows:
    """A batch without prompts. capacity: the most tokens of a prompt with its answer. stops: (E, L)."""
    each = jnp.zeros(rows, jnp.int32)
    cache = make_cache(config, segments, rows, capacity)
    answer, ends = jnp.zeros((rows, max_tokens), jnp.int32), jnp.full((rows, *stops), NEVER)
    return Rows(cache, answer, each, each, ends, each, each > 0)


def admit(
    model: Transformer,
    rows: Rows,
    prompts: jax.Array,
    lengths: jax.Array,
    places: jax.Array,
    limits: jax.Array,
    seeds: jax.Array,
    stops: jax.Array,
    *,
    sampling: Sampling,
) -> tuple[Rows, None]:
    """Put N prompts into the rows `places`, int32 [N], with the first token of each answer; a place of B: no prompt.

    prompts: int32 [N, T], of which the first lengths [n] belong to prompt n. Other arguments: see `Rows`.
    """
    count, none = len(prompts), jnp.zeros(len(prompts), jnp.int32)
    empty = jax.tree.map(
        lambda each: jnp.zeros((each.shape[0], count, *each.shape[2:]), each.dtype), rows.cache.buffers
    )
    hidden, cache = read(model, prompts, lengths, Cache(none, empty), first=True)
    last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)
    answer = jnp.zeros((count, rows.answer.shape[1]), jnp.int32)
    new = _extended(model, last, Rows(cache, answer, none, limits, stops, seeds, lengths > 0), sampling)

    def put(axis: int, old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[(*(slice(None),) * axis, places)].set(new, mode="drop")

    buffers = jax.tree.map(partial(put, 1), rows.cache.buffers, new.cache.buffers)
    others = jax.tree.map(partial(put, 0), rows[1:], new[1:])
    return Rows(Cache(put(0, rows.cache.lengths, new.cache.lengths), buffers), *others), None


def advance(
    model: Transformer, rows: Rows, going: jax.Array, fewest: jax.Array, *, steps: int, sampling: Sampling
) -> tuple[Rows, dict[str, jax.Array]]:
    """Decode up to `steps` more tokens of each answer, as long as more than `fewest` answers go on, int32 [].

    going: bool [B], False for an answer that ends here. Also returns `answer`, `length` and `active` of `Rows`.
    """

    def unfinished(state: tuple) -> jax.Array:
        step, rows = state
        return (step < steps) & (jnp.sum(rows.active) > fewest)

    def body(state: tuple) -> tuple:
        step, rows = state
        token = jnp.take_along_axis(rows.answer, jnp.maximum(rows.length - 1, 0)[:, None], axis=1)
        hidden, cache = read(model, token, rows.active.astype(jnp.int32), rows.cache)
        return step + 1, _extended(model, hidden, rows._replace(cache=cache), sampling)

    rows = rows._replace(active=rows.active & going)
    _, rows = jax.lax.while_loop(unfinished, body, (jnp.int32(0), rows))
    return rows, {"answer": rows.answer, "length": rows.length, "active": rows.active}


def _extended(model: Transformer, hidden: jax.Array, rows: Rows, sampling: Sampling) -> Rows:
    """The rows with the next token of each active answer, chosen by the hidden states [B, 1, D] before it."""
    logits = model.logits(hidden)
    if sampling.temperature:
        # from the row's own seed and length, so that other rows and their order change nothing
        keys = jax.vmap(lambda seed, drawn: jax.random.fold_in(jax.random.key(seed), drawn))(rows.seeds, rows.length)
        token = jax.vmap(lambda row, key: next_token(row, key, **sampling._asdict()))(logits, keys).astype(jnp.int32)
    else:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    here = (jnp.arange(rows.answer.shape[1]) == rows.length[:, None]) & rows.active[:, None]
    answer, length = jnp.where(here, token, rows.answer), rows.length + rows.active
    active = rows.active & (length < rows.limit) & ~_stopped(answer, length, rows.stops)
    return rows._replace(answer=answer, length=length, active=active)


def _stopped(answer: jax.Array, length: jax.Array, stops: jax.Array) -> jax.Array:
    """Whether each answer ends with one of its stops: bool [B]."""
    places = length[:, None] - stops.shape[-1] + jnp.arange(stops.shape[-1])
    last = jnp.where(places >= 0, jnp.take_along_axis(answer, jnp.maximum(places, 0), axis=1), NEVER - 1)
    return ((last[:, None] == stops) | (stops == ANY)).all(axis=-1).any(axis=-1)

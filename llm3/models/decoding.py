"""Greedy decoding and sampling: one loop for a batch of rows, each of which is an answer of its own.

A row's answer depends on its prompt, settings and seed only. Prompts of different lengths share a batch, and a row that
has ended can take the next prompt: see `llm3.models.batching`.

Shapes: B rows, T length, V vocabulary, M max tokens of an answer, E stops of a row, of up to L tokens, K alternatives.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llm3.config.model_schema import ModelConfig
from llm3.config.sampling import GREEDY, Sampling
from llm3.models.incremental import read
from llm3.models.kv_cache import Cache, make_cache
from llm3.models.lora import restrict
from llm3.models.sampling import Needs, arrays, next_token, penalised
from llm3.models.transformer import Transformer
from llm3.segments import Segments

ANY, NEVER = -1, -2  # in a stop: any token or none, and no token


class Kept(NamedTuple):
    """What a batch keeps of each row: max_tokens of its answer, `alternatives` of each token, the tokens of its text.

    variants: the adapters that the rows of each variant of the model use; (): all rows use all of them.
    """

    max_tokens: int
    alternatives: int = 0
    seen: bool = False
    variants: tuple[tuple[str, ...], ...] = ()


class Scores(NamedTuple):
    """What the model itself says of the tokens of an answer, before temperature, filters and penalty; [B, 0]: nothing.

    logprobs: float32 [B, M], natural logarithms. likeliest: int32 [B, M, K], the likeliest tokens in its place.
    their_logprobs: float32 [B, M, K].
    """

    logprobs: jax.Array
    likeliest: jax.Array
    their_logprobs: jax.Array


class Rows(NamedTuple):
    """The state of a batch while it is decoded.

    answer: int32 [B, M], the tokens so far, the last of which the cache lacks. length: int32 [B], their number. limit:
    int32 [B], the most tokens. stops: int32 [B, E, L], runs of tokens that end an answer, right-aligned after `ANY`;
    `NEVER`: no stop. seeds: int32 [B]. active: bool [B], whether the answer goes on. sampling: arrays [B]. seen: bool
    [B, V], the tokens of a row's text; [B, 0]: not kept. variant: int32 [B], a number in `Kept.variants`.
    """

    cache: Cache
    answer: jax.Array
    length: jax.Array
    limit: jax.Array
    stops: jax.Array
    seeds: jax.Array
    active: jax.Array
    sampling: Sampling
    variant: jax.Array
    seen: jax.Array
    scores: Scores


def _without_text(config: ModelConfig, count: int, kept: Kept) -> tuple[jax.Array, jax.Array, Scores]:
    """`answer`, `seen` and `scores` of rows without tokens."""
    scored = kept.max_tokens if kept.alternatives else 0
    logprobs = jnp.zeros((count, scored), jnp.float32)
    likeliest = jnp.zeros((count, scored, kept.alternatives), jnp.int32)
    seen = jnp.zeros((count, config.padded_vocab_size if kept.seen else 0), bool)
    scores = Scores(logprobs, likeliest, likeliest.astype(jnp.float32))
    return jnp.zeros((count, kept.max_tokens), jnp.int32), seen, scores


@partial(jax.jit, static_argnames=("config", "segments", "rows", "capacity", "stops", "kept"))
def no_rows(
    config: ModelConfig, segments: Segments, rows: int, capacity: int, stops: tuple[int, int], kept: Kept
) -> Rows:
    """A batch without prompts. capacity: the most tokens of a prompt with its answer. stops: (E, L)."""
    each = jnp.zeros(rows, jnp.int32)
    answer, seen, scores = _without_text(config, rows, kept)
    cache, ends = make_cache(config, segments, rows, capacity), jnp.full((rows, *stops), NEVER)
    sampling = jax.tree.map(jnp.asarray, arrays([GREEDY] * rows))
    return Rows(cache, answer, each, each, ends, each, each > 0, sampling, each, seen, scores)


def admit(
    model: Transformer,
    rows: Rows,
    prompts: jax.Array,
    lengths: jax.Array,
    places: jax.Array,
    limits: jax.Array,
    seeds: jax.Array,
    stops: jax.Array,
    sampling: Sampling,
    variant: jax.Array,
    *,
    kept: Kept,
    needs: Needs,
) -> tuple[Rows, None]:
    """Put N prompts into the rows `places`, int32 [N], with the first token of each answer; a place of B: no prompt.

    prompts: int32 [N, T], of which the first lengths [n] belong to prompt n. Other arguments: see `Rows`.
    """
    count, none = len(prompts), jnp.zeros(len(prompts), jnp.int32)
    empty = jax.tree.map(
        lambda each: jnp.zeros((each.shape[0], count, *each.shape[2:]), each.dtype), rows.cache.buffers
    )
    _choose(model, variant, kept)
    hidden, cache = read(model, prompts, lengths, Cache(none, empty), first=True)
    last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)
    answer, seen, scores = _without_text(model.config, count, kept)
    if kept.seen:
        real = jnp.arange(prompts.shape[1]) < lengths[:, None]
        seen = seen.at[jnp.arange(count)[:, None], jnp.where(real, prompts, seen.shape[1])].set(True, mode="drop")
    new = Rows(cache, answer, none, limits, stops, seeds, lengths > 0, sampling, variant, seen, scores)
    new = _extended(model, last, new, needs)

    def put(axis: int, old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[(*(slice(None),) * axis, places)].set(new, mode="drop")

    buffers = jax.tree.map(partial(put, 1), rows.cache.buffers, new.cache.buffers)
    others = jax.tree.map(partial(put, 0), rows[1:], new[1:])
    return Rows(Cache(put(0, rows.cache.lengths, new.cache.lengths), buffers), *others), None


def advance(
    model: Transformer, rows: Rows, going: jax.Array, fewest: jax.Array, steps: jax.Array, *, kept: Kept, needs: Needs
) -> tuple[Rows, dict[str, Any]]:
    """Decode up to `steps` more tokens of each answer, as long as more than `fewest` answers go on, both int32 [].

    going: bool [B], False for an answer that ends here. Also returns the answer, length, active and scores of `Rows`.
    """

    def unfinished(state: tuple) -> jax.Array:
        step, rows = state
        return (step < steps) & (jnp.sum(rows.active) > fewest)

    def body(state: tuple) -> tuple:
        step, rows = state
        token = jnp.take_along_axis(rows.answer, jnp.maximum(rows.length - 1, 0)[:, None], axis=1)
        hidden, cache = read(model, token, rows.active.astype(jnp.int32), rows.cache)
        return step + 1, _extended(model, hidden, rows._replace(cache=cache), needs)

    _choose(model, rows.variant, kept)
    rows = rows._replace(active=rows.active & going)
    _, rows = jax.lax.while_loop(unfinished, body, (jnp.int32(0), rows))
    return rows, {name: getattr(rows, name) for name in ("answer", "length", "active", "scores")}


def _choose(model: Transformer, variant: jax.Array, kept: Kept) -> None:
    """Restrict the adapters of the model to the rows whose variant uses them."""
    if kept.variants:
        names = {name for each in kept.variants for name in each}
        restrict(model, {name: jnp.array([name in each for each in kept.variants])[variant] for name in names})


def _extended(model: Transformer, hidden: jax.Array, rows: Rows, needs: Needs) -> Rows:
    """The rows with the next token of each active answer, chosen by the hidden states [B, 1, D] before it."""
    own = model.logits(hidden)[:, 0]
    logits = jax.vmap(penalised)(own, rows.seen, rows.sampling) if needs.penalises else own
    if needs.draws:
        # from the row's own seed and length, so that other rows and their order change nothing
        keys = jax.vmap(lambda seed, drawn: jax.random.fold_in(jax.random.key(seed), drawn))(rows.seeds, rows.length)
        token = jax.vmap(partial(next_token, orders=needs.orders))(logits, keys, rows.sampling)
    else:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    here = (jnp.arange(rows.answer.shape[1]) == rows.length[:, None]) & rows.active[:, None]
    answer, length = jnp.where(here, token[:, None], rows.answer), rows.length + rows.active
    active = rows.active & (length < rows.limit) & ~_stopped(answer, length, rows.stops)
    seen = rows.seen
    if seen.shape[1]:
        seen = seen.at[jnp.arange(len(seen)), jnp.where(rows.active, token, seen.shape[1])].set(True, mode="drop")
    scores = _scored(own, token, here, rows.scores)
    return rows._replace(answer=answer, length=length, active=active, seen=seen, scores=scores)


def _scored(logits: jax.Array, token: jax.Array, here: jax.Array, scores: Scores) -> Scores:
    """The scores with those of the tokens, int32 [B], at the places `here`, bool [B, M]."""
    if not scores.logprobs.shape[1]:
        return scores
    logprobs = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(logprobs, token[:, None], axis=-1)
    highest, likeliest = jax.lax.top_k(logprobs, scores.likeliest.shape[2])
    return Scores(
        jnp.where(here, chosen, scores.logprobs),
        jnp.where(here[..., None], likeliest[:, None], scores.likeliest),
        jnp.where(here[..., None], highest[:, None], scores.their_logprobs),
    )


def _stopped(answer: jax.Array, length: jax.Array, stops: jax.Array) -> jax.Array:
    """Whether each answer ends with one of its stops: bool [B]."""
    places = length[:, None] - stops.shape[-1] + jnp.arange(stops.shape[-1])
    last = jnp.where(places >= 0, jnp.take_along_axis(answer, jnp.maximum(places, 0), axis=1), NEVER - 1)
    return ((last[:, None] == stops) | (stops == ANY)).all(axis=-1).any(axis=-1)

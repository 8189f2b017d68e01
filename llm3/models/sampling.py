"""How the next token is chosen from logits: one row at a time, each by its own settings, seed and text.

The papers: temperature and top-k (Fan et al. 2018), nucleus sampling or top-p (Holtzman et al. 2020), min-p (Nguyen et
al. 2024), repetition penalty (Keskar et al. 2019, CTRL, section 4.1).
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm3.config.sampling import Sampling


def arrays(settings: Sequence[Sampling]) -> Sampling:
    """The settings of B answers as arrays [B]: top_k int32, all others float32."""
    columns = Sampling(*zip(*settings, strict=True))
    return Sampling(
        **{
            name: np.array(each, np.int32 if name == "top_k" else np.float32)
            for name, each in columns._asdict().items()
        }
    )


class Needs(NamedTuple):
    """What a compiled function has to do for its rows; a row that does not need a part is not changed by it.

    draws: some row has a temperature. orders: some row has top_k or top_p, for which the vocabulary is sorted.
    penalises: some row has a repetition penalty.
    """

    draws: bool = False
    orders: bool = False
    penalises: bool = False


def needs_of(settings: Iterable[Sampling]) -> Needs:
    """What the rows with these settings need."""
    settings = list(settings)
    drawn = [each for each in settings if each.temperature > 0]
    return Needs(
        bool(drawn),
        any(each.top_k > 0 or each.top_p < 1 for each in drawn),
        any(each.repetition_penalty != 1 for each in settings),
    )


def penalised(logits: jax.Array, seen: jax.Array, sampling: Sampling) -> jax.Array:
    """The logits of one row, float32 [V], after the repetition penalty. seen: bool [V], the tokens of its text."""
    lower = jnp.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
    return jnp.where(seen, lower, logits)


def next_token(logits: jax.Array, key: jax.Array, sampling: Sampling, *, orders: bool = True) -> jax.Array:
    """The next token of one row, int32 []. logits: float32 [V]. orders: see `Needs`."""
    # 0 for the most likely token, which stays finite; float32 has no temperature below its least normal number
    temperature = jnp.maximum(jnp.float32(sampling.temperature), jnp.finfo(jnp.float32).tiny)
    scaled = (logits - jnp.max(logits)) / temperature
    allowed = (scaled >= jnp.log(jnp.float32(sampling.min_p))) | (scaled == 0)
    if orders:
        allowed &= _most_likely(scaled, sampling)
    drawn = jax.random.categorical(key, jnp.where(allowed, scaled, -jnp.inf))
    return jnp.where(jnp.float32(sampling.temperature) == 0, jnp.argmax(logits), drawn).astype(jnp.int32)


def _most_likely(scaled: jax.Array, sampling: Sampling) -> jax.Array:
    """Which tokens top_k and top_p keep: bool [V]."""
    ordered, order = jax.lax.top_k(scaled, scaled.shape[-1])  # of equal ones, it puts smaller numbers first
    first = (jnp.arange(len(ordered)) < sampling.top_k) | (jnp.int32(sampling.top_k) == 0)
    share = jax.nn.softmax(jnp.where(first, ordered, -jnp.inf))
    kept = first & ((jnp.cumsum(share) - share < sampling.top_p) | (jnp.float32(sampling.top_p) >= 1))
    return jnp.zeros(scaled.shape, bool).at[order].set(kept, unique_indices=True)

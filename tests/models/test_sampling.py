"""The next token: filters draw from the distributions of their papers, each row by its own settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm3.config.sampling import GREEDY, Sampling
from llm3.models.sampling import Needs, arrays, needs_of, next_token, penalised


@jax.jit
def _drawn(logits: jax.Array, sampling: Sampling) -> jax.Array:
    return jax.vmap(next_token)(logits, jax.random.split(jax.random.key(0), len(logits)), sampling)


def drawn(logits: np.ndarray, settings: list[Sampling]) -> np.ndarray:
    return np.asarray(_drawn(jnp.asarray(logits, jnp.float32), jax.tree.map(jnp.asarray, arrays(settings))))


def kept(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The probabilities after all filters, by sorting: float64 [V]."""
    if not sampling.temperature:
        return np.eye(len(logits))[np.argmax(logits)]
    scores = logits.astype(np.float64) / sampling.temperature
    order = np.argsort(-scores, kind="stable")[: sampling.top_k or None]
    weights = np.exp(scores - scores.max())
    shares = weights[order] / weights[order].sum()
    count = int(np.searchsorted(np.cumsum(shares), sampling.top_p)) + 1 if sampling.top_p < 1 else len(order)
    chosen = np.zeros(len(logits), bool)
    chosen[order[:count]] = True
    found = np.where(chosen & (weights >= sampling.min_p), weights, 0)
    return found / found.sum()


SETTINGS = [
    GREEDY,
    Sampling(0.7),
    Sampling(1.5, top_k=3),
    Sampling(0.7, top_k=100),
    Sampling(1.5, top_p=0.6),
    Sampling(0.7, top_k=3, top_p=0.6),
    Sampling(1.5, min_p=0.2),
    Sampling(1.5, top_k=5, top_p=0.9, min_p=0.1),
]


def test_filters_draw_from_the_distributions_that_sorting_gives_each_row_from_its_own():
    logits = np.random.default_rng(1).normal(size=(len(SETTINGS), 11)).astype(np.float32) * 2
    draws = 4000
    found = drawn(np.repeat(logits, draws, axis=0), [each for each in SETTINGS for _ in range(draws)])
    counts = np.stack([np.bincount(row, minlength=11) for row in found.reshape(-1, draws)]) / draws
    expected = np.stack([kept(*each) for each in zip(logits, SETTINGS, strict=True)])
    assert not counts[expected == 0].any()
    np.testing.assert_allclose(counts, expected, atol=0.035)  # four standard errors at most


@pytest.mark.parametrize("filters", [{"top_k": 2}, {"top_p": 0.4}, {"top_k": 3, "top_p": 0.6}], ids=str)
def test_of_equally_likely_tokens_the_filters_keep_those_with_smaller_numbers(filters):
    logits = np.tile([0.0, 1.0, 1.0, 1.0, 1.0, -1.0], (500, 1))
    assert set(drawn(logits, [Sampling(1.0, **filters)] * 500)) == {1, 2}


@pytest.mark.parametrize("temperature", [1e-30, 1e-39, 5e-324])
@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.9}], ids=str)
def test_a_tiny_temperature_is_greedy(temperature, filters):
    logits = np.tile([0.0, 3.0, 2.999, -np.inf], (100, 1))
    assert set(drawn(logits, [Sampling(temperature, **filters)] * 100)) == {1}


def test_what_a_row_does_not_need_does_not_change_it():
    logits = jnp.asarray(np.random.default_rng(2).normal(size=50), jnp.float32)
    keys, plain = jax.random.split(jax.random.key(1), 200), Sampling(0.9)
    for orders in (False, True):
        found = jax.vmap(lambda key, orders=orders: next_token(logits, key, plain, orders=orders))(keys)
        expected = jax.vmap(lambda key: jax.random.categorical(key, (logits - logits.max()) / jnp.float32(0.9)))(keys)
        np.testing.assert_array_equal(found, expected)
    assert needs_of([GREEDY, plain]) == Needs(draws=True)
    assert needs_of([Sampling(0.0, top_k=3), Sampling(repetition_penalty=1.1)]) == Needs(penalises=True)
    assert needs_of([Sampling(0.5, top_p=0.9)]) == Needs(draws=True, orders=True)


def test_the_repetition_penalty_lowers_tokens_that_the_text_has_as_its_paper_says():
    logits, seen = jnp.array([2.0, -2.0, 3.0, -1.0]), jnp.array([True, True, False, False])
    found = penalised(logits, seen, Sampling(repetition_penalty=1.25))
    np.testing.assert_allclose(found, [2.0 / 1.25, -2.0 * 1.25, 3.0, -1.0])

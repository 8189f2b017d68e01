"""The steps that the guard accepts, compared with a plain loop over lists."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm3.training import guard

WINDOW, DEVIATIONS = 6, 3.0


def judged(values, deviations=DEVIATIONS, weights=None, start=None):
    """Which (loss, norm) pairs are accepted, the number skipped in a row after each, and the final guard."""
    state = guard.new_guard(deviations, WINDOW) if start is None else start
    step = jax.jit(lambda g, loss, norm, weight: guard.judge(g, loss, norm, weight, deviations))
    taken, in_a_row = [], []
    for (loss, norm), weight in zip(values, weights or [1.0] * len(values), strict=True):
        take, state = step(state, jnp.float32(loss), jnp.float32(norm), jnp.float32(weight))
        taken.append(bool(take))
        in_a_row.append(int(state.in_a_row))
    return taken, in_a_row, state


def by_hand(values):
    """The same with plain lists and numpy's mean and standard deviation."""
    window, taken = [], []
    for pair in values:
        last = np.array(window[-WINDOW:])
        spike = len(window) >= WINDOW and any(np.array(pair) > last.mean(axis=0) + DEVIATIONS * last.std(axis=0))
        taken.append(bool(np.isfinite(pair).all() and not spike))
        if taken[-1]:
            window.append(pair)
    return taken


def noisy(count, seed=0):
    random = np.random.default_rng(seed)
    return [(2 + 0.1 * random.standard_normal(), 1 + 0.1 * random.standard_normal()) for _ in range(count)]


def test_spikes_of_loss_and_of_norm_are_skipped_and_never_enter_the_window():
    values = noisy(40)
    values[10], values[20], values[21], values[30] = (9.0, 1.0), (2.0, 9.0), (np.nan, 1.0), (2.0, np.inf)
    taken, _, _ = judged(values)
    assert taken == by_hand(values)
    assert not any(taken[each] for each in (10, 20, 21, 30))
    assert sum(taken) >= 30, "ordinary noise is accepted"


def test_nothing_is_a_spike_before_the_window_is_full():
    assert judged([*noisy(WINDOW - 1), (100.0, 1.0)])[0] == [True] * WINDOW


def test_a_fall_is_no_spike():
    assert judged([*noisy(WINDOW), (0.01, 0.01)])[0][-1]


def test_without_deviations_only_non_finite_steps_are_skipped():
    taken, in_a_row, state = judged([*noisy(WINDOW), (1e6, 1e6), (np.nan, 1.0), (1.0, np.inf), (1.0, 1.0)], 0.0)
    assert taken == [True] * (WINDOW + 1) + [False, False, True]
    assert in_a_row[-4:] == [0, 1, 2, 0]
    assert state.window is None


def test_a_step_without_labels_is_skipped_but_not_counted():
    values = [(np.nan, 1.0), (0.0, 0.0), (np.nan, 1.0), (1.0, 1.0)]
    taken, in_a_row, state = judged(values, weights=[1.0, 0.0, 1.0, 1.0])
    assert taken == [False, False, False, True] and in_a_row == [1, 1, 2, 0]
    assert int(state.taken) == 1


@pytest.mark.parametrize("cut", [3, WINDOW + 2, 25])
def test_a_resumed_guard_judges_as_if_it_had_never_stopped(cut):
    values = noisy(40)
    values[27], values[33] = (9.0, 1.0), (2.0, 9.0)
    uninterrupted = judged(values)[0]
    first, _, state = judged(values[:cut])
    saved = jax.tree.map(np.asarray, state)  # as a checkpoint holds it
    assert first + judged(values[cut:], start=saved)[0] == uninterrupted
    if cut == 25:
        fresh = judged(values[cut:])[0]
        assert fresh != uninterrupted[cut:], "a guard without memory accepts the spikes"

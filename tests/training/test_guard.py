"""The steps that the guard accepts, compared with a plain loop over lists."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from llm3.config.schema import GuardConfig, StageConfig
from llm3.data.batch import Batch
from llm3.objectives import Sums
from llm3.training import guard
from llm3.training.phase import guard_notes, guard_restarts
from llm3.training.step import TrainState, make_train_step
from tests.helpers.tiny import jit

WINDOW, DEVIATIONS, ACCEPT_AFTER = 6, 3.0, 4


@functools.cache
def judge(deviations):
    settings = {"deviations": deviations, "accept_after": ACCEPT_AFTER}
    return jax.jit(lambda *args, restart: guard.judge(*args, restart=restart, **settings))


def judged(values, deviations=DEVIATIONS, weights=None, start=None, restarts=()):
    """Which (loss, norm) pairs are accepted, the number of non-finite ones in a row after each, and the final guard."""
    state = guard.new_guard(deviations, WINDOW) if start is None else start
    taken, in_a_row = [], []
    for i, ((loss, norm), weight) in enumerate(zip(values, weights or [1.0] * len(values), strict=True)):
        pair = jnp.float32(loss), jnp.float32(norm)
        verdict, state = judge(deviations)(state, *pair, jnp.float32(weight), restart=jnp.bool(i in restarts))
        taken.append(bool(verdict.accept))
        in_a_row.append(int(state.in_a_row))
    return taken, in_a_row, state


def by_hand(values, restarts=()):
    """The same with plain lists and numpy's mean and standard deviation."""
    window, taken, spikes = [], [], 0
    for i, pair in enumerate(values):
        window = [] if i in restarts else window
        finite, last = np.isfinite(pair).all(), np.array(window[-WINDOW:])
        full = len(window) >= WINDOW
        spike = finite and full and any(np.array(pair) > last.mean(axis=0) + DEVIATIONS * last.std(axis=0))
        spikes += spike
        if spike and spikes >= ACCEPT_AFTER:
            window, spike = [], False
        taken.append(bool(finite and not spike))
        if taken[-1]:
            window, spikes = [*window, pair], 0
    return taken


class Scalar(nnx.Module):
    """A model of one number."""

    def __init__(self):
        self.number = nnx.Param(jnp.zeros(()))


def noisy(count, seed=0):
    random = np.random.default_rng(seed)
    return [(2 + 0.1 * random.standard_normal(), 1 + 0.1 * random.standard_normal()) for _ in range(count)]


def steady(count, level):
    return [(level + 0.1 * (-1) ** i, 1.0) for i in range(count)]


def test_spikes_of_loss_and_of_norm_are_skipped_and_never_enter_the_window():
    values = noisy(40)
    values[10], values[20], values[21], values[30] = (9.0, 1.0), (2.0, 9.0), (np.nan, 1.0), (2.0, np.inf)
    taken, _, _ = judged(values)
    assert taken == by_hand(values)
    assert not any(taken[each] for each in (10, 20, 21, 30))
    assert sum(taken) >= 30, "ordinary noise is accepted"


def test_nothing_is_a_spike_before_the_window_is_full():
    assert judged([*noisy(WINDOW - 1), (100.0, 1.0)])[0] == [True] * WINDOW


def test_a_level_that_lasts_is_the_new_normal():
    before, above = steady(20, 2.0), steady(20, 7.0)
    above[12] = (99.0, 1.0)
    taken, in_a_row, _ = judged([*before, *above])
    lasting = [False] * (ACCEPT_AFTER - 1)
    assert taken[20:] == [*lasting, *[True] * (12 - len(lasting)), False, *[True] * 7]
    assert taken == by_hand([*before, *above])
    assert not any(in_a_row), "a run never ends for finite losses"


def test_a_non_finite_step_among_spikes_neither_ends_their_level_nor_belongs_to_it():
    values = [*steady(WINDOW, 2.0), *[(50.0, 1.0)] * 2, (np.nan, 1.0), *[(50.0, 1.0)] * 3]
    taken, in_a_row, _ = judged(values)
    assert taken[WINDOW:] == [False, False, False, False, True, True] and in_a_row[-4:] == [1, 1, 0, 0]


def test_a_window_that_starts_anew_forgets_the_level_before():
    values = [*steady(20, 2.0), *steady(20, 7.0)]
    values[32] = (99.0, 1.0)
    assert judged(values, restarts=(20,))[0] == [each != 32 for each in range(40)] == by_hand(values, (20,))


@pytest.mark.parametrize("restarts", [(), (WINDOW,)])
def test_a_step_restarts_the_window_at_the_steps_it_was_built_with(restarts):
    """The loss is 1 until step 6 and 9 from then on, as after a change of the mixture."""
    loss = lambda model, batch, key: Sums(batch.tokens[0, 0] + 0 * model.number[...], batch.weights[0, 0], {})  # noqa: E731
    transform = optax.sgd(0.0)
    settings = {"seed": 0, "deviations": DEVIATIONS, "accept_after": 2, "restarts": restarts}
    step = jit(make_train_step(nnx.split(Scalar(), nnx.Param)[0], loss, transform, **settings))
    state = TrainState(
        jnp.int32(0), {"number": jnp.zeros(())}, {}, transform.init({}), guard.new_guard(DEVIATIONS, WINDOW)
    )
    skipped, levels = [], []
    for level in [1.0] * WINDOW + [9.0] * 3:
        state, metrics = step(state, Batch(np.full((1, 1), level, np.float32), *[np.ones((1, 1), np.float32)] * 4))
        skipped.append(bool(metrics["skipped"]))
        levels.append(bool(metrics["new_level"]))
    assert skipped == [False] * WINDOW + [not restarts, False, False]
    assert levels == [False] * (WINDOW + 1) + [not restarts, False]


def test_a_phase_restarts_the_window_where_its_parameters_or_its_data_change():
    stage = StageConfig(
        *("finetune", {"a": 1.0}, 100, 4, 16),
        unfreeze=[[40, "all"]],
        data_schedule=[[20, {"a": 1.0}], [40, {"a": 2.0}]],
        guard=GuardConfig(deviations=3.0, window=20),
    )
    assert guard_restarts(stage) == (20, 40)
    assert guard_notes(stage, (40, 100)) == []
    assert "guard.window=20 is never full in 20 steps" in guard_notes(stage, (0, 40))[0]


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

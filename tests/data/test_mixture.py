"""A batch is a pure function of windows, weights, seed and step; evaluation sees each window exactly once."""

import collections
import itertools
import sys
import threading
import time

import numpy as np
import pytest

from llm3.data.batch import Batch
from llm3.data.mixture import Mixture, finite_batches, prefetch
from llm3.data.mixture_weights import weight_schedule
from llm3.errors import UserError


class Numbered:
    """Windows of 4 tokens with the index of the window; the last `padded` positions are padding."""

    truncated = dropped = 0

    def __init__(self, windows, name=0, padded=0, documents=1):
        self.windows, self.name, self.padded = windows, name, padded
        self.waste, self.documents = padded / 4, documents

    def __len__(self):
        return self.windows

    def __getitem__(self, index):
        segments = (np.arange(4) < 4 - self.padded).astype(np.int32)
        number = np.full(4, self.name * 1000 + index, np.int32)
        return Batch(number, np.arange(4, dtype=np.int32), segments, number, segments.astype(np.float32))


TABLES = {"a": Numbered(130, 1), "b": Numbered(110, 2), "c": Numbered(90, 3)}
WEIGHTS = [(0, {"a": 0.5, "b": 0.3, "c": 0.2})]
CHANGING = [*WEIGHTS, (11, {"b": 1.0}), (12, {"c": 1.0, "a": 7.0}), (30, {"a": 0.02, "b": 0.6, "c": 0.38})]


def numbers(mixture, steps):
    return np.concatenate([mixture.batch(step).tokens[:, 0] for step in steps]).tolist()


def assert_equal(one, other):
    for left, right in zip(one, other, strict=True):
        np.testing.assert_array_equal(left, right)


def test_a_batch_depends_on_the_step_only_also_after_a_restart_and_in_later_epochs():
    going = Mixture(TABLES, WEIGHTS, 8, seed=5)
    uninterrupted = [going.batch(step) for step in range(100)]
    assert min(going.epochs(100).values()) > 1.5
    for step in (99, 0, 63, 7):
        assert_equal(Mixture(TABLES, WEIGHTS, 8, seed=5).batch(step), uninterrupted[step])


def test_the_rows_of_all_hosts_make_up_the_global_batch():
    mixture = Mixture(TABLES, WEIGHTS, 12, seed=5)
    for hosts in (2, 3, 4):
        size = 12 // hosts
        parts = [mixture.batch(3, range(host * size, (host + 1) * size)) for host in range(hosts)]
        joined = Batch(*(np.concatenate(field) for field in zip(*parts, strict=True)))
        assert_equal(joined, mixture.batch(3))


def test_the_order_of_windows_does_not_depend_on_the_batch_size():
    assert numbers(Mixture(TABLES, WEIGHTS, 8, 5), range(30)) == numbers(Mixture(TABLES, WEIGHTS, 24, 5), range(10))


def test_each_epoch_holds_each_window_once_in_a_different_order():
    drawn = numbers(Mixture({"a": Numbered(120)}, [(0, {"a": 1.0})], 8, seed=0), range(45))
    epochs = [drawn[:120], drawn[120:240], drawn[240:360]]
    for epoch in epochs:
        assert sorted(epoch) == list(range(120))
    assert epochs[0] != epochs[1] != epochs[2] != list(range(120))


def test_the_order_depends_on_the_seed_and_not_on_other_sources():
    alone = numbers(Mixture(TABLES, [(0, {"a": 1.0})], 8, seed=5), range(30))
    assert alone != numbers(Mixture(TABLES, [(0, {"a": 1.0})], 8, seed=6), range(30))
    mixed = numbers(Mixture(TABLES, [(0, {"c": 1.0, "a": 1.0})], 8, seed=5), range(40))
    among = [number for number in mixed if 1000 <= number < 2000]
    assert among == alone[: len(among)]


@pytest.mark.parametrize("shares", [{"a": 0.5, "b": 0.3, "c": 0.2}, {"a": 0.9, "b": 0.05, "c": 0.05}, {"a": 1, "b": 1}])
def test_any_range_of_rows_is_within_two_rows_per_source_of_the_weights(shares):
    mixture = Mixture(TABLES, [(0, shares)], 8, seed=3)
    drawn = np.array([number // 1000 for number in numbers(mixture, range(60))])
    for name, source in zip("abc", (1, 2, 3), strict=True):
        counts = np.concatenate([[0], np.cumsum(drawn == source)])
        share = shares.get(name, 0) / sum(shares.values())
        for size in (8, 16, 100):
            stretches = counts[size:] - counts[:-size]
            assert np.abs(stretches - size * share).max() <= 2 + 0.005 * size


@pytest.mark.parametrize(("by", "expected"), [("tokens", {"a": 4, "b": 1}), ("documents", {"a": 1, "b": 1.5})])
def test_a_source_whose_windows_hold_less_is_drawn_more_often(by, expected):
    tables = {"a": Numbered(100, 1, padded=3, documents=300), "b": Numbered(60, 2, documents=120)}
    drawn = Mixture(tables, [(0, {"a": 1, "b": 1})], 10, 0, by=by).draws(500)
    assert drawn["a"] / drawn["b"] == pytest.approx(expected["a"] / expected["b"], rel=0.005)


def test_a_source_continues_where_it_was_when_the_weights_change():
    alone = {name: numbers(Mixture(TABLES, [(0, {name: 1.0})], 8, seed=5), range(60)) for name in TABLES}
    changing = Mixture(TABLES, CHANGING, 8, seed=5)
    drawn = numbers(changing, range(60))
    for name, source in zip("abc", (1, 2, 3), strict=True):
        among = [number for number in drawn if number // 1000 == source]
        assert among == alone[name][: len(among)]
        assert changing.draws(60)[name] == len(among)
    assert {number // 1000 for number in drawn[11 * 8 : 12 * 8]} == {2}
    assert {number // 1000 for number in drawn[12 * 8 : 30 * 8]} == {1, 3}
    assert drawn[: 11 * 8] == numbers(Mixture(TABLES, WEIGHTS, 8, seed=5), range(11))


def test_other_batch_sizes_and_batches_that_are_left_out_keep_the_order_of_the_rows():
    rows = numbers(Mixture(TABLES, WEIGHTS, 8, seed=5), range(40))
    changed = Mixture(TABLES, WEIGHTS, 8, seed=5, sizes=[(5, 12), (9, 4)], skip=[(7, 3), (9, 1)])
    expected = rows[: 5 * 8 + 2 * 12] + rows[5 * 8 + 5 * 12 : 5 * 8 + 7 * 12] + rows[5 * 8 + 7 * 12 + 4 :]
    assert numbers(changed, range(20)) == expected[: 5 * 8 + 4 * 12 + 11 * 4]
    assert [changed.batch_size(step) for step in (0, 4, 5, 8, 9, 30)] == [8, 8, 12, 12, 4, 4]
    assert sum(changed.draws(7).values()) == 5 * 8 + 5 * 12, "what was left out is behind"
    later = Mixture(TABLES, [*WEIGHTS, (7, {"b": 1.0})], 8, seed=5, sizes=[(5, 12)], skip=[(7, 3)])
    assert numbers(later, range(7)) == expected[: 5 * 8 + 2 * 12]
    assert {number // 1000 for number in numbers(later, range(7, 9))} == {2}


def test_draws_and_origins_agree_with_the_batches():
    mixture, counted = Mixture(TABLES, CHANGING, 8, seed=2), collections.Counter()
    for step in range(50):
        assert mixture.draws(step) == {name: counted[name] for name in TABLES}
        origins = mixture.origins(step)
        assert [TABLES[name][index].tokens[0] for name, index in origins] == mixture.batch(step).tokens[:, 0].tolist()
        assert mixture.origins(step, range(2, 5)) == origins[2:5]
        counted.update(name for name, _ in origins)


def test_the_millionth_batch_costs_no_more_than_the_first():
    def calls(step):
        """How many functions are called for the first batch that a mixture is asked for."""
        mixture, called = Mixture(TABLES, CHANGING, 8, seed=2), collections.Counter()
        sys.setprofile(lambda frame, event, argument: called.update([event]))
        try:
            mixture.batch(step)
        finally:
            sys.setprofile(None)
        return called["call"] + called["c_call"]

    assert calls(10**12) < 2 * max(calls(step) for step in (0, 40, 100))
    mixture = Mixture(TABLES, CHANGING, 8, seed=2)
    assert sum(mixture.draws(10**12).values()) == 8 * 10**12


def noisy(window, random):
    return window._replace(tokens=random.integers(0, 2**63, 64))


def test_sources_of_equal_length_have_different_orders():
    mixture = Mixture({"a": Numbered(100, 1), "b": Numbered(100, 2)}, [(0, {"a": 1, "b": 1})], 10, seed=0)
    origins = [origin for step in range(20) for origin in mixture.origins(step)]
    assert [index for name, index in origins if name == "a"] != [index for name, index in origins if name == "b"]


def test_random_numbers_of_a_row_depend_on_seed_step_and_row_only():
    mixture = Mixture(TABLES, WEIGHTS, 8, seed=5, corrupt=noisy)
    whole = [mixture.batch(step).tokens for step in range(6)]
    again = Mixture(TABLES, CHANGING, 8, seed=5, corrupt=noisy)
    for step, row in ((5, 7), (0, 0), (3, 2)):
        np.testing.assert_array_equal(again.batch(step, [row]).tokens[0], whole[step][row])
    rows = np.concatenate(whole)
    assert len(np.unique(rows)) == rows.size == 48 * 64  # no row repeats another's numbers, shifted or not
    assert (Mixture(TABLES, WEIGHTS, 8, seed=6, corrupt=noisy).batch(0).tokens != whole[0]).all()


def test_epochs_count_the_passes_over_each_source():
    mixture = Mixture(TABLES, [(0, {"a": 1.0, "b": 3.0}), (40, {"b": 1.0})], 8, seed=1)
    drawn = collections.Counter(number // 1000 for number in numbers(mixture, range(100)))
    assert mixture.epochs(100) == {"a": drawn[1] / 130, "b": drawn[2] / 110}
    assert mixture.epochs(0) == {"a": 0, "b": 0}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 0.0}, "a has weight 0.0"),
        ({"a": 1.0, "b": -1.0}, "b has weight -1"),
        ({"a": float("nan")}, "a has weight nan"),
        ({"aa": 1.0}, "unknown source 'aa': did you mean 'a'"),
        ({"empty": 1.0}, "empty has no windows"),
        ({}, "at least one source"),
    ],
)
def test_a_mixture_with_wrong_weights_is_refused(weights, message):
    with pytest.raises(UserError, match=message):
        Mixture(TABLES | {"empty": Numbered(0)}, [(0, {"a": 1.0}), (5, weights)], 8, seed=0)


@pytest.mark.parametrize("steps", [[], [1], [0, 5, 5], [0, 7, 3]])
def test_weights_that_do_not_start_at_0_and_ascend_are_refused(steps):
    with pytest.raises(UserError, match="ascending steps"):
        Mixture(TABLES, [(step, {"a": 1.0}) for step in steps], 8, seed=0)


def test_weights_are_by_tokens_or_documents_only():
    with pytest.raises(UserError, match=r"weights='token'.*did you mean 'tokens'"):
        Mixture(TABLES, WEIGHTS, 8, seed=0, by="token")


TOKENS = {"a": 8000, "b": 1000, "c": 500}


def made(**changes):
    fields = {"data": {"a": 1.0, "b": 1.0}, "temperature": 0, "data_schedule": [], "replay": 0, "parent": None}
    return weight_schedule(**fields | {"tokens": TOKENS, "steps": 100, "where": "config.stages.x"} | changes)


def shares_of(weights):
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


def test_by_default_the_weights_are_constant_as_in_the_config():
    assert made() == [(0, {"a": 1.0, "b": 1.0})]


@pytest.mark.parametrize(("temperature", "ratio"), [(1, 8), (3, 2), (1e9, 1)])
def test_temperature_weighs_sources_by_a_power_of_their_size(temperature, ratio):
    [(_, weights)] = made(temperature=temperature)
    assert weights["a"] / weights["b"] == pytest.approx(ratio)
    [(_, weights)] = made(temperature=temperature, data={"a": 1.0, "b": 5.0})
    assert weights["a"] / weights["b"] == pytest.approx(ratio / 5)


def test_a_schedule_replaces_the_weights_from_its_steps_on():
    phases = [[10, {"c": 1.0}], [50, {"a": 0.5, "c": 0.5}]]
    assert made(data_schedule=phases) == [(0, {"a": 1.0, "b": 1.0}), (10, {"c": 1.0}), (50, {"a": 0.5, "c": 0.5})]
    tempered = made(data_schedule=phases, temperature=1)[2][1]
    assert tempered["a"] / tempered["c"] == pytest.approx(16)


def test_replay_gives_the_parents_data_its_share_in_every_phase():
    first, then = made(data_schedule=[[10, {"c": 3.0}]], replay=0.05, parent={"a": 3.0, "c": 1.0}, temperature=1)
    assert shares_of(first[1]) == pytest.approx({"a": 0.95 * 8 / 9 + 0.05 * 0.75, "b": 0.95 / 9, "c": 0.05 * 0.25})
    assert then == (10, pytest.approx({"c": 0.95 + 0.05 * 0.25, "a": 0.05 * 0.75}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"aa": 1.0}}, r"config.stages.x.data: unknown source 'aa': did you mean 'a'"),
        ({"data": {"a": float("inf")}}, "a has weight inf"),
        ({"data_schedule": [[10, {"bb": 1.0}]]}, r"data_schedule: step 10: unknown source 'bb': did you mean 'b'"),
        ({"data_schedule": [[10, {"b": 0}]]}, r"step 10: b has weight 0; expected a number above 0"),
        ({"data_schedule": [[10, {"b": "much"}]]}, r"b has weight 'much'"),
        ({"data_schedule": [[10, {}]]}, r"step 10: names no source"),
        ({"data_schedule": [[0, {"b": 1.0}]]}, r"step 0: expected ascending steps after 0 and before the stage's 100"),
        ({"data_schedule": [[9, {"b": 1.0}], [9, {"a": 1.0}]]}, "step 9: expected ascending"),
        ({"data_schedule": [[100, {"b": 1.0}]]}, "step 100: expected ascending"),
        ({"data_schedule": [["9", {"b": 1.0}]]}, "step '9': expected ascending"),
        ({"data_schedule": [10, {"b": 1.0}]}, r"10: expected a pair \[step"),
        ({"replay": 0.1}, r"config.stages.x.replay=0.1: needs a `start`"),
        ({"replay": 0.1, "parent": {"d": 1.0}}, "replay: the parent's data: unknown source 'd'"),
        ({"temperature": 2, "tokens": TOKENS | {"b": 0}}, r"config.stages.x.temperature: source 'b' has no tokens"),
    ],
)
def test_wrong_data_of_a_stage_is_an_error_that_says_what_was_expected(changes, message):
    with pytest.raises(UserError, match=message):
        made(**changes)


@pytest.mark.parametrize("batch_size", [1, 4, 7, 100])
def test_evaluation_sees_each_window_once_in_batches_filled_with_padding(batch_size):
    batches = list(finite_batches(Numbered(17, padded=1), batch_size))
    assert {batch.tokens.shape for batch in batches} == {(batch_size, 4)}
    rows = Batch(*(np.concatenate(field) for field in zip(*batches, strict=True)))
    assert rows.tokens[:17, 0].tolist() == list(range(17))
    assert all(not field[17:].any() for field in rows)
    assert rows.weights.sum() == 17 * 3


def test_an_empty_table_gives_no_evaluation_batch():
    assert list(finite_batches(Numbered(0), 4)) == []


def test_prefetch_yields_in_order_and_runs_at_most_depth_ahead():
    made = []
    items = prefetch(lambda step: made.append(step) or step * step, 3, 9, depth=2)
    for position, item in enumerate(items):
        assert item == (3 + position) ** 2
        assert len(made) <= position + 3
    assert made == [3, 4, 5, 6, 7, 8]


def test_prefetch_works_ahead_of_its_consumer():
    made = threading.Event()
    items = prefetch(lambda step: made.set() if step == 1 else None, 0, 5)
    next(items)
    assert made.wait(5)
    items.close()


def test_an_exception_in_prefetch_reaches_the_consumer():
    items = prefetch(lambda step: 6 // (2 - step), 0, 5)
    assert list(itertools.islice(items, 2)) == [3, 6]
    with pytest.raises(ZeroDivisionError):
        next(items)


def test_the_prefetch_thread_ends_when_the_consumer_stops_early():
    def running():
        return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]

    for step in prefetch(lambda step: time.sleep(0.001) or step, 0, 10**9):
        if step == 3:
            assert running()
            break
    assert not running()

"""A batch is a pure function of tables, weights, seed and step; evaluation sees each window exactly once."""

import collections
import itertools
import threading
import time

import numpy as np
import pytest
from datasets import Dataset

from llm3.data import cache, tokenizer
from llm3.data.batch import Batch
from llm3.data.mixture import Mixture, finite_batches, prefetch
from llm3.data.packing import ExampleWindows, PieceWindows, StreamWindows
from llm3.errors import UserError


class Numbered:
    """Windows of 4 tokens that hold their own number; the last `padded` positions are padding."""

    def __init__(self, windows, name=0, padded=0):
        self.windows, self.name, self.padded = windows, name, padded
        self.waste, self.truncated = padded / 4, 0

    def __len__(self):
        return self.windows

    def __getitem__(self, index):
        segments = (np.arange(4) < 4 - self.padded).astype(np.int32)
        number = np.full(4, self.name * 1000 + index, np.int32)
        return Batch(number, np.arange(4, dtype=np.int32), segments, number, segments.astype(np.float32))


TABLES = {"a": Numbered(130, 1), "b": Numbered(110, 2), "c": Numbered(90, 3)}
WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.2}


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
        parts = [mixture.batch(3, slice(host * size, (host + 1) * size)) for host in range(hosts)]
        joined = Batch(*(np.concatenate(field) for field in zip(*parts, strict=True)))
        assert_equal(joined, mixture.batch(3))


def test_the_order_of_windows_does_not_depend_on_the_batch_size():
    assert numbers(Mixture(TABLES, WEIGHTS, 8, 5), range(30)) == numbers(Mixture(TABLES, WEIGHTS, 24, 5), range(10))


def test_each_epoch_holds_each_window_once_in_an_order_of_its_own():
    drawn = numbers(Mixture({"a": Numbered(120)}, {"a": 1.0}, 8, seed=0), range(45))
    epochs = [drawn[:120], drawn[120:240], drawn[240:360]]
    for epoch in epochs:
        assert sorted(epoch) == list(range(120))
    assert epochs[0] != epochs[1] != epochs[2] != list(range(120))


def test_another_seed_gives_another_order_and_another_source_changes_no_order():
    alone = numbers(Mixture(TABLES, {"a": 1.0}, 8, seed=5), range(30))
    assert alone != numbers(Mixture(TABLES, {"a": 1.0}, 8, seed=6), range(30))
    mixed = numbers(Mixture(TABLES, {"c": 1.0, "a": 1.0}, 8, seed=5), range(40))
    among = [number for number in mixed if 1000 <= number < 2000]
    assert among == alone[: len(among)]


def test_weights_are_shares_of_tokens_measured_after_packing(tmp_path):
    texts = ["word " * (5 + i * i % 60) for i in range(400)]
    trained = tokenizer.train(texts, 300)
    labels = [str(i % 2) for i in range(400)]
    built = cache.build(Dataset.from_dict({"text": texts, "label": labels}), trained, tmp_path)
    tables = {
        "stream": StreamWindows(built, 64),
        "pieces": PieceWindows(built, 64),
        "examples": ExampleWindows(built, 64),
    }
    tables["sparse"] = _Widened(Numbered(200, padded=3), 16)
    weights = {"stream": 0.4, "pieces": 0.05, "examples": 0.25, "sparse": 0.3}
    origin = {_key(table[i]): name for name, table in tables.items() for i in range(len(table))}
    mixture = Mixture(tables, weights, 16, seed=0)
    tokens = collections.Counter()
    for step in range(150):
        batch = mixture.batch(step)
        for row in range(16):
            window = Batch(*(field[row] for field in batch))
            tokens[origin[_key(window)]] += int((window.segments > 0).sum())
    for name, weight in weights.items():
        assert tokens[name] / tokens.total() == pytest.approx(weight, abs=0.01)


class _Widened(Numbered):
    """The same windows, each position repeated."""

    def __init__(self, narrow, times):
        super().__init__(narrow.windows, narrow.name, narrow.padded)
        self.narrow, self.times = narrow, times

    def __getitem__(self, index):
        return Batch(*(np.repeat(field, self.times) for field in self.narrow[index]))


def _key(window):
    return b"".join(field.tobytes() for field in window)


def test_epochs_tell_how_often_each_table_was_gone_through():
    mixture = Mixture(TABLES, {"a": 1.0, "b": 3.0}, 8, seed=1)
    drawn = collections.Counter(number // 1000 for number in numbers(mixture, range(100)))
    epochs = mixture.epochs(100)
    assert set(epochs) == {"a", "b"}
    assert epochs["a"] == pytest.approx(drawn[1] / 130, abs=1.5 / 130)
    assert epochs["b"] == pytest.approx(drawn[2] / 110, abs=1.5 / 110)
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
def test_a_mixture_that_cannot_be_drawn_is_refused(weights, message):
    with pytest.raises(UserError, match=message):
        Mixture(TABLES | {"empty": Numbered(0)}, weights, 8, seed=0)


@pytest.mark.parametrize("batch_size", [1, 4, 7, 100])
def test_evaluation_sees_each_window_once_in_full_batches_whose_rest_is_padding(batch_size):
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

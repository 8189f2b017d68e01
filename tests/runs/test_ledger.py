"""What training reads, row by row, is the same for any number of hosts, wherever it was killed and resumed."""

import collections
import random

import numpy as np
import pytest

from llm3.data.mixture import Mixture, prefetch
from llm3.data.windows import examples, pieces, stream
from tests.helpers.tiny_tokens import TokensInMemory, make_documents

LENGTH, BATCH, STEPS, SAVE_EVERY = 16, 8, 130, 7
WEIGHTS = {"running": 0.5, "whole": 0.3, "labelled": 0.2}
CHANGING = [
    (0, WEIGHTS),
    (33, {"whole": 1.0, "labelled": 1.0}),
    (61, {"running": 0.6, "whole": 0.25, "labelled": 0.15}),
]
CACHES = {
    "running": TokensInMemory(make_documents(60, seed=1, most=60), rows=range(500, 560)),
    "whole": TokensInMemory(make_documents(150, seed=2, most=LENGTH + 1)),
    "labelled": TokensInMemory(make_documents(110, seed=3, most=LENGTH), labels=[i % 3 for i in range(110)]),
}
KINDS = {"running": stream, "whole": pieces, "labelled": examples}


def corrupt(window, rng):
    hidden = (rng.random(LENGTH) < 0.15) & (window.segments > 0)
    return window._replace(tokens=np.where(hidden, rng.integers(3, 200, LENGTH), window.tokens).astype(np.int32))


CASES = {
    "same weights": ([(0, WEIGHTS)], None),
    "weights that change": (CHANGING, None),
    "weights that change, corrupted": (CHANGING, corrupt),
}


class Logged:
    """A table that notes which windows are read."""

    def __init__(self, name, log):
        self.table, self.name, self.log = KINDS[name].WindowTable(CACHES[name], LENGTH), name, log
        self.waste, self.documents_of = self.table.waste, self.table.documents_of

    def __len__(self):
        return len(self.table)

    def __getitem__(self, index):
        self.log.append((self.name, index))
        return self.table[index]


class Host:
    """One of `hosts` processes: it opens its own tables, and computes its own rows only."""

    def __init__(self, schedule, noise, host=0, hosts=1):
        self.log, self.noise = [], noise
        self.tables = {name: Logged(name, self.log) for name in CACHES}
        self.mixture = Mixture(self.tables, schedule, BATCH, seed=11, corrupt=noise)
        self.rows = range(host * BATCH // hosts, (host + 1) * BATCH // hosts)

    def read(self, step):
        """[(source, window, [(row of the source, first token, last token + 1), ...], bytes of the row), ...]"""
        self.log.clear()
        batch, entries = self.mixture.batch(step, self.rows), []
        for row, (source, index) in enumerate(self.log):
            cache, ranges = CACHES[source], []
            for segment, document, (first, stop) in self.tables[source].documents_of(index):
                ranges.append((int(cache.rows[document]), first, stop))
                if self.noise is None:  # what the table says is what the batch holds
                    held = batch.tokens[row][batch.segments[row] == segment]
                    assert held.tolist() == cache.document(document)[first:stop].tolist()
            entries.append((source, index, ranges, b"".join(field[row].tobytes() for field in batch)))
        return entries


def ledger(schedule, noise, hosts=1, steps=range(STEPS)):
    """What the hosts read together, step by step, each a little ahead of what is trained on."""
    running = [Host(schedule, noise, host, hosts) for host in range(hosts)]
    read = zip(*(prefetch(host.read, steps.start, steps.stop) for host in running), strict=True)
    return [[entry for rows in each for entry in rows] for each in read]


def killed(schedule, noise, seed):
    """The same, killed at random steps, and resumed from the last checkpoint on another number of hosts."""
    chance, done, hosts = random.Random(seed), [], 1
    while len(done) < STEPS:
        first = len(done) // SAVE_EVERY * SAVE_EVERY
        hosts = chance.choice([each for each in (1, 2, 4) if each != hosts])
        stop = min(first + chance.randint(SAVE_EVERY, 60), STEPS)
        done = done[:first] + ledger(schedule, noise, hosts, range(first, stop))
    return done


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def case(request):
    """(schedule, corruption, ledger of one host that is never killed)"""
    return *request.param, ledger(*request.param)


def test_one_two_and_four_hosts_read_the_same_rows_in_the_same_order(case):
    schedule, noise, uninterrupted = case
    assert ledger(schedule, noise, 2) == uninterrupted
    assert ledger(schedule, noise, 4) == uninterrupted


@pytest.mark.parametrize("seed", [0, 1])
def test_runs_killed_at_random_and_resumed_on_other_numbers_of_hosts_read_the_same_rows(case, seed):
    schedule, noise, uninterrupted = case
    assert killed(schedule, noise, seed) == uninterrupted


def test_three_epochs_of_every_source_use_each_token_once_an_epoch(case):
    schedule, noise, uninterrupted = case
    rows, host = [entry for step in uninterrupted for entry in step], Host(schedule, noise)
    assert min(host.mixture.epochs(STEPS).values()) > 3
    for source, table in host.tables.items():
        read = [entry for entry in rows if entry[0] == source]
        orders = []
        for epoch in range(3):
            of_epoch = read[epoch * len(table) : (epoch + 1) * len(table)]
            orders.append([index for _, index, _, _ in of_epoch])
            assert sorted(orders[-1]) == list(range(len(table)))
            used = [(row, token) for _, _, ranges, _ in of_epoch for row, *range_ in ranges for token in range(*range_)]
            assert sorted(used) == list(inputs_of(source))
        assert orders[0] != orders[1] != orders[2] != orders[0]


def inputs_of(source):
    """(row, token) of all that a model is given once an epoch; where tokens are predicted, an end predicts nothing."""
    cache = CACHES[source]
    for document, row in enumerate(cache.rows.tolist()):
        last_of_stream = source == "running" and document == cache.documents - 1
        given = len(cache.document(document)) - (source == "whole" or last_of_stream)
        yield from ((row, token) for token in range(given))


@pytest.mark.parametrize("by", ["tokens", "documents"])
def test_shares_after_packing_are_within_one_percent_of_the_weights(by):
    caches = {
        "long": TokensInMemory(make_documents(90, seed=4, least=100, most=400)),
        "short": TokensInMemory(make_documents(100, seed=5, most=50)),
        "sparse": TokensInMemory(make_documents(60, seed=6, least=36, most=60)),
    }
    tables = {name: (stream if name == "long" else pieces).WindowTable(cache, 64) for name, cache in caches.items()}
    assert tables["sparse"].waste > 0.2
    weights, used = {"long": 0.62, "short": 0.3, "sparse": 0.08}, collections.Counter()
    mixture = Mixture(tables, [(0, weights)], 16, seed=1, by=by)
    for step in range(300):
        for source, index in mixture.origins(step):
            for _, _, (first, stop) in tables[source].documents_of(index):
                used[source] += stop - first if by == "tokens" else first == 0
    for name, weight in weights.items():
        assert used[name] / used.total() == pytest.approx(weight, rel=0.01)

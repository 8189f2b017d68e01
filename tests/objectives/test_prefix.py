"""Prefix LM and denoisers: what is made of a document, and who may look at what."""

import functools
import re

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from llm3.data import tokenizer as tokenizers
from llm3.data.batch import Batch
from llm3.errors import UserError
from llm3.models.transformer import abstract
from llm3.objectives import Task, causal, prefix
from llm3.registry import read_options
from llm3.segments import segmented
from tests.helpers import reference
from tests.helpers.tiny import LENGTH, jit, make_documents, make_params, make_row, model_config, stack

BYTES = tokenizers.train([], 260)
BOS, EOS, MASK = BYTES.bos_id, BYTES.eos_id, BYTES.mask_id
VOCAB = BYTES.vocab_size


def task(length: int, *denoisers: dict) -> Task:
    options = {"denoisers": list(denoisers)} if denoisers else {}
    return Task(read_options(prefix, options, "objective"), BYTES, length)


def text_document(random: np.random.Generator, length: int) -> np.ndarray:
    """<bos>, text, <eos>."""
    return np.array([BOS, *random.integers(4, VOCAB, length - 2), EOS], np.int32)


def raw_window(lengths: list[int], size: int, seed: int = 0) -> tuple[Batch, list[np.ndarray]]:
    """Documents end to end in a window that may cut the last; and what of each is in it, with the token after it."""
    documents = [text_document(np.random.default_rng([seed, i]), length) for i, length in enumerate(lengths)]
    whole = make_row(*documents, length=sum(lengths))
    window = Batch(*(np.pad(field, (0, max(0, size - len(field))))[:size] for field in whole))
    parts = [whole.tokens[:size][window.segments[: sum(lengths)] == i + 1] for i in range(len(documents))]
    last = max(i for i, part in enumerate(parts) if len(part))
    if window.weights[-1]:
        parts[last] = np.append(parts[last], window.targets[-1])
    return window, parts


def read_back(row: Batch, segment: int, mode: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The input of a document without its mode, and its targets."""
    place = row.segments == segment
    np.testing.assert_array_equal(row.positions[place], np.arange(place.sum()))
    first = np.flatnonzero(row.weights[place])[0]
    given, targets = row.tokens[place][: first + 1], row.targets[place][first:]
    np.testing.assert_array_equal(row.weights[place][first:], 1)
    np.testing.assert_array_equal(row.tokens[place][first + 1 :], targets[:-1])
    at = int(given[0] == BOS)
    assert tuple(given[at : at + len(mode)]) == mode
    return np.delete(given, np.arange(at, at + len(mode))), targets


def fill(given: np.ndarray, targets: np.ndarray) -> list[int]:
    """The text that spans were taken from: each mask of the input is replaced by the span after the next mask."""
    assert targets[0] == MASK and targets[-1] == EOS and np.sum(targets == MASK) == np.sum(given == MASK)
    found, place = [], 0
    for token in given:
        if token != MASK:
            found.append(int(token))
            continue
        place += 1
        while targets[place] != MASK and place < len(targets) - 1:
            found.append(int(targets[place]))
            place += 1
    return found


SPANS = [
    {"kind": "span", "share": share, "mean_length": mean} for share, mean in ((0.15, 3), (0.5, 3), (0.5, 1), (0.3, 8))
]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(3, 90), min_size=1, max_size=5),
    st.integers(0, 2**32),
    st.sampled_from([*SPANS, {"kind": "span", "mode": "[X]"}, {"mode": "[S]", "share": 0.25}]),
)
def test_input_and_targets_give_the_text_back(lengths, seed, denoiser):
    """No token is lost but the one after a cut, which the next window has, and none gets into another document."""
    this = task(128, denoiser)
    window, parts = raw_window(lengths, prefix.raw_length(this), seed)
    row = prefix.corrupt(window, np.random.default_rng(seed), this)
    assert len(row.tokens) == 128
    for segment, part in enumerate(parts, start=1):
        inside = int(np.sum(window.segments == segment))
        short = inside < prefix.SHORTEST
        if len(part) < 2:
            assert not np.any(row.segments == segment)
            continue
        mode = () if short else tuple(BYTES.encode(denoiser.get("mode", "")))
        read, targets = read_back(row, segment, mode)
        if short or denoiser.get("kind") != "span":
            assert [*read, *targets] == part.tolist()
        else:
            assert fill(read, targets) == part[:inside].tolist()


MIXTURES = [prefix.UL2, [SPANS[2]], [{"kind": "span", "share": 0.5, "mode": "[NLG]"}], [{"mode": "[S2S]"}]]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(3, 300), min_size=1, max_size=80),
    st.integers(0, 2**32),
    st.sampled_from([64, 128, 257]),
    st.sampled_from(MIXTURES),
)
def test_every_window_fits_whatever_is_drawn(lengths, seed, length, denoisers):
    this = task(length, *denoisers)
    window, _ = raw_window(lengths, prefix.raw_length(this), seed)
    row = prefix.corrupt(window, np.random.default_rng(seed), this)
    assert {field.shape for field in row} == {(length,)}
    assert set(row.segments) - {0} <= set(window.segments)
    assert np.all(row.weights[row.segments == 0] == 0)


def test_the_default_wastes_nothing_and_splits_anywhere():
    this, window = task(64), make_row(np.arange(4, 69), length=65)
    window = Batch(*(field[:64] for field in window))
    assert prefix.raw_length(this) == 64
    counts = np.zeros(65)
    for seed in range(3200):
        row = prefix.corrupt(window, np.random.default_rng(seed), this)
        np.testing.assert_array_equal(row.tokens, window.tokens)
        counts[int(row.weights.sum())] += 1
    assert counts[0] == 0 and abs(counts[1:] - 50).max() < 4.5 * np.sqrt(50)  # of 3200 draws, 64 splits


@pytest.mark.parametrize("share", [0.25, 0.5, 0.8, 1.0])
def test_the_prefix_leaves_the_share_to_be_predicted_on_average(share):
    window = Batch(*(field[:100] for field in make_row(np.arange(4, 105), length=101)))
    this = task(100, {"share": share})
    found = [prefix.corrupt(window, np.random.default_rng(seed), this).weights.mean() for seed in range(2000)]
    assert np.mean(found) == pytest.approx(share, abs=0.02)
    assert min(found) == pytest.approx(max(0.01, 2 * share - 1), abs=0.02)
    assert max(found) == pytest.approx(min(1, 2 * share), abs=0.02)


@pytest.mark.parametrize(("share", "mean"), [(0.15, 3), (0.5, 3), (0.5, 8), (0.15, 64)])
def test_spans_have_the_share_and_the_length_that_the_options_say(share, mean):
    window = make_row(np.random.default_rng(0).integers(4, VOCAB, 500), length=500)
    this = task(1000, {"kind": "span", "share": share, "mean_length": mean})
    tokens, spans, starts = [], [], []
    for seed in range(300):
        read, targets = read_back(prefix.corrupt(window, np.random.default_rng(seed), this), 1, ())
        spans.append(np.sum(read == MASK))
        tokens.append(len(targets) - 1 - spans[-1])
        starts.extend(np.flatnonzero(read == MASK) / len(read))
        assert not np.any((read[1:] == MASK) & (read[:-1] == MASK))
    assert np.mean(tokens) / 500 == pytest.approx(share, rel=0.01)
    assert mean <= np.sum(tokens) / np.sum(spans) + 0.05 < mean * 1.25
    assert np.mean(starts) == pytest.approx(0.5, abs=0.03)  # no end of the text is favoured


def test_a_span_is_as_likely_at_any_place_the_ends_among_them():
    window, this = make_row(np.arange(4, 37), length=33), task(64, {"kind": "span", "share": 0.03})
    counts = np.zeros(33)
    for seed in range(3300):
        read, targets = read_back(prefix.corrupt(window, np.random.default_rng(seed), this), 1, ())
        assert len(targets) == 3 and len(read) == 33
        counts[np.flatnonzero(read == MASK)] += 1
    assert abs(counts - 100).max() < 4.5 * np.sqrt(100)


def test_denoisers_are_drawn_by_weight_for_each_document_and_from_the_generator_alone():
    modes = {"a": 3.0, "b": 1.0}
    this = task(512, *({"mode": mode, "weight": weight} for mode, weight in modes.items()))
    window, _ = raw_window([100] * 4, prefix.raw_length(this))
    drawn = []
    for seed in range(300):
        row, again = (prefix.corrupt(window, np.random.default_rng(seed), this) for _ in range(2))
        np.testing.assert_array_equal(row.tokens, again.tokens)
        drawn.append([BYTES.decode([row.tokens[row.segments == segment][1]]) for segment in range(1, 5)])
    first = np.array(drawn) == "a"
    assert first.mean() == pytest.approx(0.75, abs=4 * np.sqrt(0.75 * 0.25 / first.size))
    assert abs(np.corrcoef(first[:, 0], first[:, 1])[0, 1]) < 0.25


@functools.cache
def model(**changes):
    """(config, params, function of params and batch: logits, function: sums) of a tiny decoder."""
    config = model_config(vocab_size=VOCAB, **changes)
    graph = abstract(config).graph

    def logits(params, batch):
        model = nnx.merge(graph, params)
        marked = prefix.prefix_of(batch)
        return model.logits(model(batch.tokens, batch.positions, batch.segments, prefix=marked))

    def sums(params, batch):
        return prefix.loss(nnx.merge(graph, params), batch, jax.random.key(0), task(LENGTH))

    return config, make_params(config), jit(logits), jit(sums)


def run(function, params: dict, *rows: Batch):
    return jax.device_get(function(segmented(params, ((0, 3),)), stack(*rows)))


def corrupted(count: int, *denoisers: dict, least: int = 4) -> list[Batch]:
    """Two documents a window."""
    rows = [make_row(*make_documents(2, seed, least=least)) for seed in range(count)]
    return [prefix.corrupt(row, np.random.default_rng(seed), task(LENGTH, *denoisers)) for seed, row in enumerate(rows)]


def plain_prefix(row: Batch) -> np.ndarray:
    """Position by position."""
    marked = np.zeros(LENGTH, bool)
    for segment in set(row.segments):
        places = np.flatnonzero(row.segments == segment)
        weighted = [place for place in places if row.weights[place]]
        marked[places[0] : (weighted[0] if weighted else places[-1]) + 1] = True
    return marked


def test_the_prefix_of_a_document_ends_where_its_first_target_is_predicted():
    rows = corrupted(6)
    rows[0].weights[rows[0].segments == 1] = 0
    found = prefix.prefix_of(stack(*rows))
    for row, marked in zip(rows, found, strict=True):
        np.testing.assert_array_equal(marked, plain_prefix(row))


def prefix_attention(config, weights, x, row, layer):
    """As `reference.attention`, and every position also sees the prefix of its document."""
    query, key, value = (reference.project(weights[name], x) for name in ("query", "key", "value"))
    query = reference.rope(query, row.positions, config.rope_theta)
    key, mixed, marked = reference.rope(key, row.positions, config.rope_theta), np.zeros_like(query), plain_prefix(row)
    for t in range(len(x)):
        seen = [s for s in range(len(x)) if row.segments[s] == row.segments[t] and (s <= t or marked[s])]
        for head in range(config.heads):
            shared = head * config.kv_heads // config.heads
            scores = np.exp(key[seen, shared] @ query[t, head] / np.sqrt(config.head_dim))
            mixed[t, head] = scores / scores.sum() @ value[seen, shared]
    return reference.project(weights["out"], mixed)


@pytest.mark.parametrize("changes", [{}, {"remat": "full"}], ids=str)
def test_prefix_attention_agrees_with_an_independent_forward_pass(monkeypatch, changes):
    config, params, logits, _ = model(**changes)
    rows = corrupted(3)
    found = run(logits, params, *rows)
    plain = reference.logits(config, params, stack(*rows))
    monkeypatch.setattr(reference, "attention", prefix_attention)
    expected = reference.logits(config, params, stack(*rows))
    text = stack(*rows).segments > 0
    np.testing.assert_allclose(found[text], expected[text], atol=1e-4)
    assert np.abs(plain - expected)[text].max() > 0.01


def test_no_target_is_seen_by_what_predicts_it():
    params, (row, *_) = model()[1], corrupted(1, {"share": 0.9}, least=8)
    before = run(model()[2], params, row)[0]
    for place in np.flatnonzero(row.weights)[:-1]:
        tokens = row.tokens.copy()
        if row.segments[place + 1] == row.segments[place]:
            tokens[place + 1] = (tokens[place + 1] + 1) % VOCAB
            after = run(model()[2], params, row._replace(tokens=tokens))[0]
            np.testing.assert_array_equal(before[: place + 1], after[: place + 1])
            assert np.abs(before[place + 1] - after[place + 1]).max() > 1e-3


def test_packed_documents_have_the_losses_that_they_have_alone():
    rows, alone = corrupted(4), []
    for row in rows:
        for segment in (1, 2):
            place, only = row.segments == segment, make_row()
            for field, values in zip(only, row, strict=True):
                field[: place.sum()] = values[place]
            alone.append(only)
    _, params, _, sums = model()
    together = run(sums, params, *rows)
    halves = [run(sums, params, *alone[i : i + 4]) for i in (0, 4)]
    assert together.weight == sum(each.weight for each in halves) > 8
    assert together.loss == pytest.approx(sum(each.loss for each in halves), rel=1e-5)


def test_changing_one_document_changes_no_logit_of_its_neighbour():
    rows = corrupted(2)
    changed = [row._replace(tokens=np.where(row.segments == 1, (row.tokens + 1) % VOCAB, row.tokens)) for row in rows]
    old, new = (run(model()[2], model()[1], *each) for each in (rows, changed))
    others = stack(*rows).segments != 1
    np.testing.assert_array_equal(old[others], new[others])
    assert np.abs(old - new)[~others].max() > 0.01


def test_with_everything_to_be_predicted_it_is_causal_language_modelling():
    row = make_row(*make_documents(2, 3, least=5))
    found = prefix.corrupt(row, np.random.default_rng(0), task(LENGTH, {"share": 1.0}))
    config, params, _, sums = model()
    graph = abstract(config).graph
    plain = jit(lambda params, batch: causal.loss(nnx.merge(graph, params), batch, jax.random.key(0), None))
    expected, result = run(plain, params, row, row), run(sums, params, found, found)
    assert result.weight == expected.weight
    assert result.loss == pytest.approx(expected.loss, rel=1e-5)


def test_the_mixture_of_ul2_has_seven_denoisers_and_three_modes():
    denoisers = read_options(prefix, {"denoisers": list(prefix.UL2)}, "objective").denoisers
    assert [each.mode for each in denoisers].count("[X]") == 4 and len(denoisers) == 7
    assert {each.weight for each in denoisers} == {1.0}


@pytest.mark.parametrize(
    ("denoiser", "message"),
    [
        ({"kind": "spam"}, "did you mean 'span'"),
        ({"share": 0.0}, "share=0.0: expected a share above 0, up to 1"),
        ({"kind": "span", "share": 0.8}, "would touch; expected at most 0.75"),
        ({"kind": "span", "mean_length": 0.5}, "mean_length=0.5"),
        ({"weight": 0}, "weight=0"),
        ({"wieght": 1}, "did you mean 'weight'"),
        ("span", "expected a dict"),
    ],
    ids=str,
)
def test_a_denoiser_that_makes_no_sense_is_refused(denoiser, message):
    with pytest.raises(UserError, match=re.escape(message)):
        read_options(prefix, {"denoisers": [denoiser]}, "objective")


def test_ul2_is_named():
    named = read_options(prefix, {"denoisers": "ul2"}, "objective")
    assert named == read_options(prefix, {"denoisers": list(prefix.UL2)}, "objective") and len(named.denoisers) == 7
    assert {(each.kind, each.mode) for each in named.denoisers} == {("span", "[R]"), ("prefix", "[S]"), ("span", "[X]")}

"""Windows hold each target exactly once, keep documents apart, and report their padding."""

import collections
import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llm3.data import packing, tokenizer
from llm3.data.windows import examples, pieces, stream
from llm3.errors import UserError
from tests.helpers.tiny_tokens import TokensInMemory

TEXTS = [f"{i} " + "some words of text, é " * (i * i % 23) for i in range(80)] + ["", "short"]
trained = tokenizer.train(TEXTS, 300)
LENGTHS = [2, 7, 64, 5000]
TABLES = [stream.WindowTable, pieces.WindowTable, examples.WindowTable]
TABLES_AND_LENGTHS = [case for case in itertools.product(TABLES, LENGTHS) if case != (examples.WindowTable, 2)]


@pytest.fixture(scope="module")
def built():
    documents = [[trained.bos_id, *trained.encode(text), trained.eos_id] for text in TEXTS]
    return TokensInMemory(documents, labels=[len(text) % 4 for text in TEXTS])


def windows_of(table):
    return [table[i] for i in range(len(table))]


def segments_of(window):
    """The (tokens, positions, targets, weights) of each segment of a window."""
    for segment in range(1, window.segments.max() + 1):
        inside = window.segments == segment
        yield tuple(field[inside] for field in (window.tokens, window.positions, window.targets, window.weights))


def all_pairs(built):
    """Every (token, next token) inside a document, by the definition."""
    documents = [built.document(i).tolist() for i in range(built.documents)]
    return [pair for document in documents for pair in itertools.pairwise(document)]


def counted_pairs(table):
    pairs = []
    for window in windows_of(table):
        counted = window.weights == 1
        pairs += zip(window.tokens[counted].tolist(), window.targets[counted].tolist(), strict=True)
    return pairs


@pytest.mark.parametrize("length", LENGTHS)
def test_the_stream_counts_every_token_but_bos_once_as_a_target_in_order(built, length):
    assert counted_pairs(stream.WindowTable(built, length)) == all_pairs(built)


@pytest.mark.parametrize("length", LENGTHS)
def test_pieces_count_every_target_once(built, length):
    assert sorted(counted_pairs(pieces.WindowTable(built, length))) == sorted(all_pairs(built))


@pytest.mark.parametrize("table", [stream.WindowTable, pieces.WindowTable])
def test_eos_is_a_target_of_each_document_and_bos_and_padding_of_none(built, table):
    targets = collections.Counter(target for _, target in counted_pairs(table(built, 64)))
    assert targets[trained.eos_id] == built.documents
    assert not targets[trained.bos_id]
    assert not targets[trained.pad_id]


@pytest.mark.parametrize("table", [stream.WindowTable, pieces.WindowTable])
@pytest.mark.parametrize("length", LENGTHS)
def test_the_bytes_of_the_counted_targets_are_the_bytes_of_the_text(built, table, length):
    windows = windows_of(table(built, length))
    total = sum((trained.byte_lengths[window.targets] * window.weights).sum() for window in windows)
    assert total == sum(len(text.encode()) for text in TEXTS)


@pytest.mark.parametrize(("table", "length"), TABLES_AND_LENGTHS)
def test_positions_restart_with_each_document_and_padding_is_segment_0_at_the_end(built, table, length):
    for window in windows_of(table(built, length)):
        used = int((window.segments > 0).sum())
        assert (window.segments[:used] > 0).all()
        for field in window:
            assert not field[used:].any()
        expected = []
        for segment in range(1, window.segments.max() + 1):
            expected += [(segment, position) for position in range((window.segments == segment).sum())]
        assert list(zip(window.segments[:used], window.positions[:used], strict=True)) == expected


@pytest.mark.parametrize("table", TABLES)
def test_a_window_is_a_batch_row_of_the_declared_types(built, table):
    window = table(built, 64)[0]
    assert [field.dtype for field in window] == [np.int32, np.int32, np.int32, np.int32, np.float32]
    assert {field.shape for field in window} == {(64,)}


@pytest.mark.parametrize(("table", "length"), TABLES_AND_LENGTHS)
def test_the_most_pieces_are_the_segments_of_the_fullest_window(built, table, length):
    packed = table(built, length)
    assert packed.max_pieces == max(window.segments.max() for window in windows_of(packed))


@pytest.mark.parametrize(("table", "length"), TABLES_AND_LENGTHS)
def test_waste_is_the_share_of_padded_positions(built, table, length):
    packed = table(built, length)
    segments = np.concatenate([window.segments for window in windows_of(packed)])
    assert packed.waste == pytest.approx((segments == 0).mean(), abs=1e-12)


@pytest.mark.parametrize("length", LENGTHS)
def test_a_document_is_cut_from_its_own_start_whatever_else_is_in_the_window(built, length):
    packed = [piece for window in windows_of(pieces.WindowTable(built, length)) for piece in segments_of(window)]
    found = collections.Counter((tuple(tokens), tuple(targets)) for tokens, _, targets, _ in packed)
    expected = collections.Counter()
    for i in range(built.documents):
        document = built.document(i).tolist()
        for start in range(0, len(document) - 1, length):
            inputs = document[start : start + length][: len(document) - 1 - start]
            expected[tuple(inputs), tuple(document[start + 1 : start + length + 1])] += 1
    assert found == expected


@pytest.mark.parametrize("length", LENGTHS[1:])
def test_an_example_is_labelled_at_its_last_token_only_and_cut_before_its_eos(built, length):
    table = examples.WindowTable(built, length)
    found = collections.Counter()
    for window in windows_of(table):
        for tokens, _, targets, weights in segments_of(window):
            assert tokens[-1] == trained.eos_id
            assert weights.tolist() == [0] * (len(tokens) - 1) + [1]
            assert not targets[:-1].any()
            found[tuple(tokens), targets[-1]] += 1
    expected = collections.Counter()
    for i in range(built.documents):
        document = built.document(i).tolist()
        cut = document if len(document) <= length else [*document[: length - 1], trained.eos_id]
        expected[tuple(cut), built.labels[i]] += 1
    assert found == expected
    assert table.truncated == sum(len(built.document(i)) > length for i in range(built.documents))


def test_examples_need_labels():
    with pytest.raises(UserError, match="labels"):
        examples.WindowTable(TokensInMemory([[1, 5, 2]]), 64)


@pytest.mark.parametrize(("table", "length"), TABLES_AND_LENGTHS)
def test_a_table_names_the_documents_and_tokens_of_each_segment(built, table, length):
    packed = table(built, length)
    for index in range(len(packed)):
        window, named = packed[index], packed.documents_of(index)
        assert [segment for segment, _, _ in named] == list(range(1, window.segments.max() + 1))
        for segment, document, (first, stop) in named:
            tokens = built.document(document)[first:stop].tolist()
            if table is examples.WindowTable:  # a cut document keeps its <eos>
                tokens[-1] = trained.eos_id
            assert window.tokens[window.segments == segment].tolist() == tokens


@pytest.mark.parametrize("table", [stream.WindowTable, pieces.WindowTable])
@pytest.mark.parametrize("length", LENGTHS)
def test_a_table_counts_the_documents_in_it(built, table, length):
    packed = table(built, length)
    named = {document for index in range(len(packed)) for _, document, _ in packed.documents_of(index)}
    assert packed.documents == len(named) == built.documents


@pytest.mark.parametrize("table", TABLES)
def test_a_table_has_no_window_outside_its_length_and_refuses_windows_of_one_token(built, table):
    packed = table(built, 64)
    for index in (len(packed), -1):
        with pytest.raises(IndexError):
            packed[index]
    with pytest.raises(UserError, match="sequence_length=1"):
        table(built, 1)


@given(st.lists(st.integers(1, 30)), st.integers(30, 50), st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_packing_places_each_piece_once_and_no_window_overflows(sizes, capacity, block):
    order, bounds = packing.pack(np.array(sizes, np.int64), capacity, block)
    assert sorted(order.tolist()) == list(range(len(sizes)))
    windows = [[sizes[i] for i in order[a:b]] for a, b in itertools.pairwise(bounds)]
    assert all(0 < sum(window) <= capacity for window in windows)


@given(st.lists(st.integers(1, 29), min_size=1, max_size=5))
@example([11])
@settings(max_examples=50, deadline=None)
def test_packing_keeps_the_bound_of_best_fit_decreasing(cuts):
    """Pieces that 60 windows a cut hold without a gap, the short ones first: the worst order for best fit."""
    sizes = sorted(60 * [size for cut in cuts for size in (cut, 30 - cut)])
    _, bounds = packing.pack(np.array(sizes, np.int64), 30)
    fewest = 60 * len(cuts)
    assert fewest <= len(bounds) - 1 <= 11 / 9 * fewest + 4


def test_packing_fills_windows_with_the_best_fitting_pieces():
    order, bounds = packing.pack(np.array([3, 7, 5, 5, 9, 1]), 10)
    assert [order[a:b].tolist() for a, b in itertools.pairwise(bounds)] == [[4, 5], [1, 0], [2, 3]]

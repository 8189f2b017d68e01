"""Reading comprehension: answers are found where the data say, chunks cover contexts, and examples are told apart."""

# ruff: noqa: RUF001  (full-width punctuation is meant)

import functools
import json
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from llm3.config.data_schema import SourceConfig
from llm3.data import tokenizer
from llm3.data.batch import Batch
from llm3.data.formats import BadRow, span
from llm3.data.packing import empty_window
from llm3.data.windows.spans import CHOICE, END, START, WindowTable
from llm3.errors import UserError
from llm3.models.transformer import abstract
from llm3.objectives import span as objective
from llm3.segments import segmented
from tests.helpers import reference
from tests.helpers.tiny import jit, make_params, model_config, stack
from tests.helpers.tiny_cache import BYTES, MemoryCache

SOURCE = SourceConfig("x", text="context", prompt="question", answers="answers")
CMRC = pathlib.Path(__file__).parents[1] / "data" / "fixtures" / "reading" / "cmrc2018" / "train.jsonl"
MIXED = "Zürich 🏔️ hat 434'335 Einwohner；蘇黎世是瑞士最大的城市，e\u0301tat 2020。"


def row(context=MIXED, question="谁？", answers=()):
    texts, starts = [a[0] for a in answers], [a[1] for a in answers]
    return {"context": context, "question": question, "answers": {"text": texts, "answer_start": starts}}


def document(context: str, question: str, answers, tok=BYTES):
    return span.encode(span.read_row(row(context, question, answers), SOURCE), tok, "")


@functools.cache
def merged():
    return tokenizer.train([MIXED * 5], 320)


def test_a_document_is_the_question_and_the_context_between_special_tokens():
    found = document(MIXED, "谁？", [("瑞士", MIXED.index("瑞士"))], merged())
    tokens = found.tokens.tolist()
    context = found.note["context"]
    assert (tokens[0], tokens[context - 1], tokens[-1]) == (BYTES.bos_id, BYTES.eos_id, BYTES.eos_id)
    assert tokens.count(BYTES.bos_id) == 1 and tokens.count(BYTES.eos_id) == 2
    assert merged().decode(tokens[1 : context - 1]) == "谁？" and merged().decode(tokens[context:-1]) == MIXED
    assert found.text_bytes == len("谁？".encode()) + len(MIXED.encode())


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip), st.data())
def test_an_answer_in_any_script_is_covered_by_the_fewest_tokens(context, data):
    start = data.draw(st.integers(0, len(context) - 1))
    answer = context[start : data.draw(st.integers(start + 1, len(context)))]
    if not answer.strip():
        return
    for tok in (BYTES, merged()):
        found = document(context, "q", [(answer, start)], tok)
        (first, last), bytes_of = found.note["spans"][0], tok.byte_lengths
        before = bytes_of[found.tokens[found.note["context"] : first]].sum()
        through = before + bytes_of[found.tokens[first : last + 1]].sum()
        wanted = len(context[:start].encode()), len(context[: start + len(answer)].encode())
        assert before <= wanted[0] and through >= wanted[1]
        assert before + bytes_of[found.tokens[first]] > wanted[0]
        assert through - bytes_of[found.tokens[last]] < wanted[1]


def test_annotators_who_agree_give_one_span_and_all_their_texts():
    found = document("abcdef", "q", [("cd", 2), ("bcd", 1), ("cd", 2)])
    assert found.note["answers"] == ["cd", "bcd", "cd"]
    assert found.note["spans"] == [[5, 6], [4, 6]]


def test_a_question_may_have_no_answer():
    assert document("abc", "q", []).note == {"answers": [], "spans": [], "context": 3}


def test_answers_may_also_be_a_list_as_in_the_files_of_squad():
    given_row = row("abc") | {"answers": [{"text": "b", "answer_start": 1, "answer_id": 7}]}
    assert span.read_row(given_row, SOURCE) == span.read_row(row("abc", answers=[("b", 1)]), SOURCE)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"answers": {"text": ["b"], "answer_start": [0]}}, "answer is not at its offset"),
        ({"answers": {"text": ["c"], "answer_start": [-1]}}, "answer is not at its offset"),
        ({"answers": {"text": ["c"], "answer_start": [9]}}, "answer is not at its offset"),
        ({"answers": {"text": ["b"], "answer_start": []}}, "answers is not like"),
        ({"answers": {"text": ["b"]}}, "answers is not like"),
        ({"answers": "b"}, "answers is not like"),
        ({"answers": None}, "answers is null"),
        ({"answers": {"text": ["b"], "answer_start": ["1"]}}, "values other than texts and integers"),
        ({"answers": {"text": [""], "answer_start": [1]}}, "an empty text"),
        ({"question": " "}, "question is empty"),
        ({"context": 3}, "context is of type int"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_by_its_reason(changes, reason):
    with pytest.raises(BadRow, match=reason):
        span.read_row(row("abc") | changes, SOURCE)


def test_offsets_into_a_template_are_refused():
    with pytest.raises(UserError, match=r"sources\.\*\.text='\{title\}.*answers are spans of a column"):
        SourceConfig("x", text="{title}\n{context}", prompt="question", answers="answers")


def test_every_answer_of_cmrc_2018_is_found_in_the_tokens_that_cover_it():
    rows = [json.loads(line) for line in CMRC.read_text(encoding="utf-8").splitlines()]
    tok = tokenizer.train([each["context"] for each in rows], 2048)
    exact = 0
    for each in rows:
        record = span.read_row(each, SOURCE)
        found = span.encode(record, tok, "")
        first, last = found.note["spans"][0]
        covered = tok.decode(found.tokens[first : last + 1])
        assert record["answers"][0][0] in covered
        exact += record["answers"][0][0].strip() == covered.strip()
    assert len(rows) == 48 and exact / len(rows) > 0.94  # the others share a token with a neighbour


def contexts(*answers, question="qq") -> MemoryCache:
    """One document a context of 40 letters; answers: [first, stop) characters, or None."""
    letters = "".join(chr(ord("a") + i % 26) for i in range(40))
    made = [document(letters, question, [(letters[a[0] : a[1]], a[0])] if a else []) for a in answers]
    return MemoryCache(made)


def chunks_of(table: WindowTable):
    """(document, (first, stop), tokens, targets, weights) of every chunk, in the order of documents and places."""
    found = []
    for index in range(len(table)):
        window = table[index]
        for segment, doc, part in table.documents_of(index):
            here = window.segments == segment
            found.append((doc, part, window.tokens[here], window.targets[here], window.weights[here]))
            np.testing.assert_array_equal(window.positions[here], np.arange(here.sum()))
    return sorted(found, key=lambda each: each[:2])


def test_what_fits_is_one_chunk_and_chunks_are_packed():
    cache = contexts((3, 5), None, (39, 40))
    table = WindowTable(cache, 100)
    assert (len(table), table.truncated, table.dropped) == (2, 0, 0)
    assert table.waste == pytest.approx(1 - 3 * 45 / 200)
    for (doc, part, tokens, targets, weights), answer in zip(chunks_of(table), [(3, 5), None, (39, 40)], strict=True):
        np.testing.assert_array_equal(tokens, cache.document(doc))
        assert part == (4, 44)
        expected = np.array([CHOICE, 0, 0, 0, *[CHOICE] * 40, 0])
        start, end = (4 + answer[0], 4 + answer[1] - 1) if answer else (0, 0)
        expected[start] |= START
        expected[end] |= END
        np.testing.assert_array_equal(targets, expected)
        np.testing.assert_array_equal(weights, [1, *[0] * 44])


@pytest.mark.parametrize("at", [0, 10, 12, 13, 36])
def test_a_long_context_is_cut_into_parts_that_overlap_by_half_each_with_the_question(at):
    cache = contexts((at, at + 4))
    table = WindowTable(cache, 21)  # room for 16 tokens of the context
    found = chunks_of(table)
    assert [part for _, part, *_ in found] == [(4, 20), (12, 28), (20, 36), (28, 44)]
    whole = cache.document(0)
    for _, (first, stop), tokens, targets, weights in found:
        np.testing.assert_array_equal(tokens, [*whole[:4], *whole[first:stop], whole[-1]])
        assert weights.tolist() == [1, *[0] * 20]
        held = first <= 4 + at and 4 + at + 4 <= stop
        start = 4 + 4 + at - first if held else 0
        assert np.flatnonzero(targets & START).tolist() == [start]
        assert np.flatnonzero(targets & END).tolist() == [start + 3 if held else 0]
    assert table.dropped == 0


@settings(max_examples=40, deadline=None)
@given(st.integers(8, 60), st.integers(0, 20), st.integers(0, 39), st.integers(1, 40))
def test_every_token_of_a_context_is_in_a_chunk_and_every_answer_that_fits_in_half_of_the_room(length, asked, at, size):
    stop = min(at + size, 40)
    cache = contexts((at, stop), question="q" * (asked + 1))
    table, room = WindowTable(cache, length), length - asked - 4
    if asked + 1 > length // 2:
        assert (len(table), table.dropped) == (0, 1)
        return
    found = chunks_of(table)
    first_token = asked + 3
    covered = {token for _, (first, last), *_ in found for token in range(first, last)}
    assert covered == set(range(first_token, first_token + 40))
    holding = [each for each in found if each[3][0] == CHOICE]
    if stop - at <= room // 2 or room >= 40:
        assert holding and table.dropped == 0
    assert table.dropped == (not holding)
    assert all(weights[0] == bool(holding) for *_, weights in found)


def test_a_window_too_short_for_a_question_is_refused():
    with pytest.raises(UserError, match="sequence_length=7: expected at least 8"):
        WindowTable(contexts(None), 7)


@functools.cache
def run(causal: bool):
    """batch -> (logits, sums) of a tiny model with two outputs."""
    config = model_config(vocab_size=BYTES.vocab_size, classes=2, causal=causal, pool="last" if causal else "mean")
    graph, params = abstract(config).graph, make_params(config)

    @jit
    def both(params, batch):
        model = nnx.merge(graph, segmented(params, ((0, config.layers),)))
        return objective.span_logits(model, batch), objective.loss(model, batch, jax.random.key(0), None)

    def by_hand(window: Batch) -> np.ndarray:
        return reference.project(params["head"], reference.row_hidden(config, params, window))

    return lambda batch: jax.device_get(both(params, batch)), by_hand


def windows(count: int) -> list[Batch]:
    """Windows of 24 with one or two chunks each, some without their answer."""
    table = WindowTable(contexts((3, 5), (10, 14), None, question="q"), 24)
    short = WindowTable(MemoryCache([document("abcd", "q", [("bc", 1)]), document("xyz", "q", [])]), 24)
    assert len(short) == 1
    return [short[0], *(table[index] for index in range(len(table)))][:count]


@pytest.mark.parametrize("causal", [True, False])
def test_nats_are_the_mean_of_those_of_start_and_end_over_the_choices_of_a_chunk(causal):
    sums, by_hand = run(causal)
    batch = stack(*windows(4))
    expected = hits = 0.0
    for window in windows(4):
        logits = by_hand(window)
        for segment in range(1, window.segments.max() + 1):
            here = (window.segments == segment) & (window.targets & CHOICE > 0)
            both = []
            for column, bit in enumerate((START, END)):
                target = np.flatnonzero(window.targets[here] & bit)
                expected += reference.nats(logits[here, column][None], target)[0] / 2
                both.append(logits[here, column].argmax() == target[0])
            hits += all(both)
    found = sums(batch)[1]
    assert found.loss == pytest.approx(expected, rel=1e-5)
    assert (found.weight, found.metrics["exact"]) == (batch.weights.sum(), hits)


def test_exact_counts_examples_whose_start_and_end_are_both_the_likeliest():
    class Told:
        """A model whose logits are its input."""

        def __init__(self, logits):
            self.logits = logits

        def __call__(self, *_, key=None):
            return self.logits

        def head(self, hidden):
            return hidden

    batch = stack(*windows(1))
    bits = batch.targets[..., None] & np.array([START, END]) > 0
    right, one_end_wrong = 5.0 * bits, 5.0 * bits
    outside = np.where(batch.targets[..., None] & CHOICE > 0, 0, 1000.0)  # of no consequence
    first_end = np.flatnonzero(bits[0, :, 1])[0]
    one_end_wrong[0, first_end - 1, 1] = 6
    for logits, hits in ((right, 2), (right + outside, 2), (one_end_wrong, 1)):
        found = objective.loss(Told(logits.astype(np.float32)), batch, None, None)
        assert (found.metrics["exact"], found.weight) == (hits, 2)
    nats = objective.loss(Told(right.astype(np.float32)), batch, None, None).loss
    choices = np.array([(batch.targets[batch.segments == s] & CHOICE > 0).sum() for s in (1, 2)])
    assert nats == pytest.approx(np.log(1 + (choices - 1) * np.exp(-5)).sum(), rel=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_packed_chunks_have_the_loss_and_the_logits_of_each_alone(causal):
    sums, _ = run(causal)
    packed, alone = windows(1)[0], []
    for segment in (1, 2):
        here, window = packed.segments == segment, empty_window(24)
        for field, values in zip(window, packed, strict=True):
            field[: here.sum()] = values[here]
        window.segments[: here.sum()] = 1
        alone.append(window)
    logits, together = sums(stack(packed, *[empty_window(24)] * 3))
    each_logits, apart = sums(stack(*alone, *[empty_window(24)] * 2))
    for row_number, segment in enumerate((1, 2)):
        here = packed.segments == segment
        np.testing.assert_allclose(logits[0, here], each_logits[row_number, : here.sum()], atol=1e-5)
    assert together.loss == pytest.approx(apart.loss, rel=1e-5)
    assert together.weight == apart.weight == 2


@pytest.mark.parametrize("causal", [True, False])
def test_padding_and_weight_zero_add_nothing_and_a_weight_scales(causal):
    sums, _ = run(causal)
    batch = stack(*windows(4))
    one, three, none, empty = (
        sums(each)[1]
        for each in (
            batch,
            batch._replace(weights=3 * batch.weights),
            batch._replace(weights=0 * batch.weights),
            stack(*[empty_window(24)] * 4),
        )
    )
    assert three.loss == pytest.approx(3 * one.loss, rel=1e-5) and three.weight == 3 * one.weight
    for nothing in (none, empty):
        assert (nothing.loss, nothing.weight, nothing.metrics["exact"]) == (0, 0, 0)


def test_gradients_are_finite_also_where_a_row_has_no_chunk():
    config = model_config(vocab_size=BYTES.vocab_size, classes=2, causal=False, pool="mean")
    graph, params = abstract(config).graph, make_params(config)
    batch = stack(*windows(3), empty_window(24))

    def total(params):
        return objective.loss(nnx.merge(graph, segmented(params, ((0, 3),))), batch, None, None).loss

    gradient = jax.device_get(jit(jax.grad(total))(params))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))
    assert np.any(gradient["head"]["kernel"])

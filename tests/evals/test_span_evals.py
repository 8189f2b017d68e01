"""Exact match and F1 of spans: by the rules of each data set, over chunks, and however the documents are batched."""

# ruff: noqa: RUF001  (full-width punctuation is meant)

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm3 import evals
from llm3.config.data_schema import SourceConfig
from llm3.data import tokenizer
from llm3.data.formats import span as row_format
from llm3.data.mixture import finite_batches
from llm3.data.windows.spans import END, START
from llm3.errors import UserError
from llm3.evals import span
from llm3.registry import read_options
from tests.helpers.tiny_cache import BYTES, MemoryCache, make_context, without_predictions

SOURCE = SourceConfig("x", text="context", prompt="question", answers="answers")
CONTEXT = "In 1850 the town had 12 mills; by 1900, there were 31."


def cache_of(*rows, tok=BYTES) -> MemoryCache:
    """rows: (context, question, answers), each answer a text of the context, at its first place."""
    records = []
    for context, question, answers in rows:
        places = {"text": list(answers), "answer_start": [context.index(each) for each in answers]}
        records.append(row_format.read_row({"context": context, "question": question, "answers": places}, SOURCE))
    return MemoryCache([row_format.encode(record, tok, "") for record in records])


ROWS = [
    (CONTEXT, "How many in 1850?", ["12", "12 mills"]),
    (CONTEXT, "When 31?", ["1900"]),
    (CONTEXT, "Who?", []),
    ("蘇黎世是瑞士最大的城市。", "哪裡？", ["瑞士"]),
    ("short", "q", ["short"]),
]


class Oracle(evals.EvalContext):
    """A test whose model points at the targets of each chunk. height: of these logits, by (start, end)."""

    height = (9.0, 9.0)

    def each(self, function, *arrays, table=None, change=None):
        for batch in finite_batches(table, self.config.batch_size):
            bits = batch.targets[..., None] & np.array([START, END]) > 0
            yield batch, {"logits": (bits * np.array(self.height)).astype(np.float32)}


def oracle(cache, **changes) -> evals.EvalContext:
    test = make_context(span, cache, **{"length": 100} | changes, classes=2)
    return Oracle(**{name: getattr(test, name) for name in evals.EvalContext.__dataclass_fields__})


@pytest.mark.parametrize(("length", "batch_size"), [(100, 4), (40, 1), (40, 3), (300, 2)])
def test_a_perfect_predictor_is_perfect_in_windows_of_any_length(length, batch_size):
    test = oracle(cache_of(*ROWS), length=length, batch_size=batch_size)
    assert span.predictions(test) == ["12", "1900", "", "瑞士", "short"]
    found = span.evaluate(test)
    assert (found["exact_match"], found["f1"], found["items"]) == (1.0, 1.0, 5)
    assert found["no_answer"] == {"share": 0.2, "predicted": 0.2, "exact_match": 1.0}
    assert found["answerable"] == {"exact_match": 1.0, "f1": 1.0}
    assert found["examples"][0] == {"question": "How many in 1850?", "answers": ["12", "12 mills"], "prediction": "12"}
    columns = found["predictions"]
    assert columns["item"].tolist() == [0, 3, 6, 9, 12]  # the documents are stored in the opposite order
    assert columns["truth"] == columns["prediction"] == ["short", "瑞士", "", "1900", "12"]
    assert columns["references"][-1] == ["12", "12 mills"]
    assert columns["score"].tolist() == columns["f1"].tolist() == [1.0] * 5


def test_where_every_question_has_an_answer_nothing_is_said_of_those_without():
    found = without_predictions(span.evaluate(oracle(cache_of(*ROWS[:2]))))
    assert found.keys() == {"exact_match", "f1", "items", "examples"}


def test_tokens_wider_than_an_answer_cost_what_lies_beside_it():
    tok = tokenizer.train(["meters"] * 9, 270)
    assert len(tok.encode("meters")) == 1
    test = oracle(cache_of(("12 meters", "q", ["meter"]), tok=tok), tokenizer=tok)
    assert span.predictions(test) == ["meters"]


def test_a_span_that_cuts_a_character_loses_that_character_only():
    class Shifted(Oracle):
        def each(self, *args, **kwargs):
            for batch, result in super().each(*args, **kwargs):
                yield batch, {"logits": np.roll(result["logits"], 1, axis=1)}

    test = oracle(cache_of(("蘇黎世是", "q", ["黎世"])))
    shifted = Shifted(**{name: getattr(test, name) for name in evals.EvalContext.__dataclass_fields__})
    assert span.predictions(shifted) == ["世"]


def test_a_document_without_a_prediction_counts_as_one_without_an_answer():
    test = oracle(cache_of(*ROWS, (CONTEXT, "w" * 60, ["12"])))  # a question longer than half of the window
    found = span.evaluate(test)
    assert found["items"] == 6 and found["exact_match"] == pytest.approx(5 / 6)
    assert found["no_answer"]["predicted"] == pytest.approx(2 / 6)


def test_no_answer_is_chosen_by_the_difference_of_its_score_and_the_best_span():
    cache = cache_of((CONTEXT, "Who?", []))  # "no answer": 18, the best span: 0
    for threshold, predicted in ((17.9, 1.0), (18.0, 0.0), (math.inf, 0.0)):
        test = oracle(cache, options=span.Options(no_answer_threshold=threshold))
        assert span.evaluate(test)["no_answer"]["predicted"] == predicted


def test_no_span_is_longer_than_allowed_and_none_ends_before_it_starts():
    rng = np.random.default_rng(0)
    for most in (1, 3, 50):
        starts, ends = rng.standard_normal((2, 20))
        score, first, last = span.best_span(starts, ends, most)
        spans = [(starts[i] + ends[j], i, j) for i in range(20) for j in range(i, min(20, i + most))]
        assert (score, first, last) == pytest.approx(max(spans))


def test_predictions_do_not_depend_on_batch_size_or_packing():
    cache = cache_of(*ROWS)
    model = {"classes": 2, "causal": False, "pool": "mean", "length": 100}
    expected = span.predictions(make_context(span, cache, batch_size=4, **model))
    assert len(set(expected)) > 2
    for size in (1, 3, 16):
        assert span.predictions(make_context(span, cache, batch_size=size, **model)) == expected
    apart = [span.predictions(make_context(span, cache.subset([i]), **model))[0] for i in range(cache.documents)]
    assert apart == expected


@pytest.mark.parametrize(
    ("prediction", "reference", "exact", "f1"),
    [
        ("The Mills.", "mills", 1, 1),
        ("12 mills", "12", 0, 2 / 3),
        ("a b b", "b b b c", 0, 2 * 2 / 6),
        ("x", "y", 0, 0),
        ("", "", 1, 1),
        ("", "y", 0, 0),
        ("the", "", 1, 1),
    ],
)
def test_squad_compares_words_without_case_punctuation_and_articles(prediction, reference, exact, f1):
    assert span.squad_exact(prediction, reference) == exact
    assert span.squad_f1(prediction, reference) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("prediction", "reference", "exact", "f1"),
    [
        ("《战国无双3》", "战国无双3", 1, 1),
        ("光荣和ω-Force", "光荣和ωforce", 1, 1),
        ("光荣", "光荣和ω-force", 0, 2 * 2 / (2 + 4)),
        ("甲乙丙丁", "甲丙丁", 0, 2 * 2 / 7),  # the longest common substring, not subsequence
        ("1,000 米", "1,000米", 0, 1),  # a space is no punctuation, and no segment
        ("the town", "town", 0, 2 / 3),  # articles count
        ("无", "有", 0, 0),
        ("", "", 1, 1),
        ("", "有", 0, 0),
    ],
)
def test_cmrc_compares_characters_by_the_longest_common_run(prediction, reference, exact, f1):
    assert span.cmrc_exact(prediction, reference) == exact
    assert span.cmrc_f1(prediction, reference) == pytest.approx(f1)


def plain_segments(text: str) -> list[str]:
    """Characters of the answer one after the other: a Chinese one stands alone, others are gathered in between."""
    segments, gathered = [], ""
    for character in text.lower().strip():
        if character in "-，":
            continue
        if "一" <= character <= "\u9fa5":
            segments += [*gathered.split(), character]
            gathered = ""
        else:
            gathered += character
    return segments + gathered.split()


def longest_run(found: list[str], expected: list[str]) -> int:
    """The longest common run, by the table that textbooks fill in."""
    best, above = 0, [0] * (len(expected) + 1)
    for one in found:
        row = [0] * (len(expected) + 1)
        for j, other in enumerate(expected, start=1):
            row[j] = above[j - 1] + 1 if one == other else 0
            best = max(best, row[j])
        above = row
    return best


ANSWERS = st.text("甲乙丙aB1，- ", max_size=12)


@settings(max_examples=100, deadline=None)
@given(ANSWERS, ANSWERS)
def test_cmrc_f1_is_that_of_the_plain_algorithm(prediction, reference):
    found, expected = plain_segments(prediction), plain_segments(reference)
    assert span.cmrc_segments(prediction) == found
    run, whole = longest_run(found, expected), len(found) + len(expected)
    assert span.cmrc_f1(prediction, reference) == (pytest.approx(2 * run / whole) if whole else 1)


def test_numbers_and_words_with_marks_inside_are_one_segment():
    assert span.cmrc_segments("约1,000.5米(don't)") == ["约", "1,000.5", "米", "(", "don't", ")"]


def test_the_nearest_reference_counts():
    assert span.RULES["squad"].best("12 mills", ["31", "12", "12 mills"]) == (1.0, 1.0)
    assert span.RULES["cmrc2018"].best("甲乙", ["丙", "甲乙丁丁"]) == (0.0, pytest.approx(4 / 6))


def test_the_rules_are_chosen_by_name():
    cache = cache_of(("the town", "q", ["the town"]))
    test = oracle(cache, options=span.Options(rules="cmrc2018"))
    assert span.evaluate(test)["exact_match"] == 1
    with pytest.raises(UserError, match=r"evaluations.x.*rules='cmrc'.*did you mean 'cmrc2018'"):
        read_options(span, {"rules": "cmrc"}, "evaluations.x")
    with pytest.raises(UserError, match=r"evaluations.x.*max_answer_tokens=0: expected at least 1"):
        read_options(span, {"max_answer_tokens": 0}, "evaluations.x")

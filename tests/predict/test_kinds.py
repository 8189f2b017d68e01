"""Each kind of prediction is what the reference computes, one row at a time, in float64."""

import numpy as np
import pytest

from llm3.config.data_schema import SourceConfig
from llm3.data.formats import dialogue
from llm3.evals import span
from llm3.predict.kinds.spans import characters
from llm3.predict.session import Item
from llm3.segments import segmented
from tests.helpers import tiny_predict as tiny
from tests.helpers.tiny_answers import TALK, encoded
from tests.helpers.tiny_cache import BYTES, MemoryCache, make_context
from tests.helpers.tiny_export import SPELLED, model, tokenizer
from tests.helpers.tiny_predict import LABELS, document, predicted, softmax

TEXTS = ["fox", "The quick brown fox", "naïve 数学 🙂", "a", "fox jumps over the quick brown fox and more", "數"]
CLOSE = {"rel": 2e-4, "abs": 2e-5}


def rows_of(texts, column="body"):
    return [{column: text} for text in texts]


def test_labels_are_those_of_the_task_head_with_their_probabilities(tmp_path):
    found = predicted(tiny.write(tmp_path / "run", "labels"), rows_of(TEXTS), "--probabilities")
    for text, row in zip(TEXTS, found, strict=True):
        shares = softmax(tiny.head("labels", tiny.hidden("labels", document(text)))[-1])
        assert row["label"] == LABELS[int(shares.argmax())] and row["error"] is None
        assert row["probability"] == pytest.approx(shares.max(), **CLOSE)
        assert list(row["probabilities"].values()) == pytest.approx(shares.tolist(), **CLOSE)
        assert tuple(row["probabilities"]) == LABELS
    assert [row["truncated"] for row in found] == [len(document(text, length=99)) > 16 for text in TEXTS]
    assert len({row["label"] for row in found}) > 1 and any(row["truncated"] for row in found)


def test_of_several_labels_those_above_one_half_are_given(tmp_path):
    found = predicted(tiny.write(tmp_path / "run", "labels", label_sets=True), rows_of(TEXTS))
    for text, row in zip(TEXTS, found, strict=True):
        shares = 1 / (1 + np.exp(-tiny.head("labels", tiny.hidden("labels", document(text)))[-1]))
        assert row["labels"] == [name for name, share in zip(LABELS, shares, strict=True) if share > 0.5]
        assert row["probability"] == pytest.approx(shares[shares > 0.5].tolist(), **CLOSE)
    assert len({len(row["labels"]) for row in found}) > 1


def test_embeddings_are_the_mean_of_the_hidden_states_whatever_the_batch(tmp_path):
    run = tiny.write(tmp_path / "run", "labels")
    found = predicted(run, rows_of(TEXTS), "--what=embeddings")
    others = predicted(run, rows_of(TEXTS[::-1]), "--what=embeddings", "--batch_size=8", name="other.jsonl")
    for text, row, other in zip(TEXTS, found, others[::-1], strict=True):
        mean = tiny.hidden("labels", document(text)).mean(axis=0)
        assert row["embedding"] == pytest.approx(mean.tolist(), **CLOSE)
        assert row["embedding"] == pytest.approx(other["embedding"], rel=1e-5, abs=1e-6)


def test_scores_are_the_nats_of_the_text_over_all_of_its_pieces(tmp_path):
    found = predicted(tiny.write(tmp_path / "run", "scores"), rows_of(TEXTS, "text"))
    for text, row in zip(TEXTS, found, strict=True):
        tokens, nats = document(text, length=999), 0.0
        for first in range(0, len(tokens) - 1, 16):
            piece = tokens[first : first + 17]
            shares = softmax(tiny.logits("scores", piece[:-1]))
            counted = piece[1:] != 2  # the end is no text
            nats -= np.log(shares[np.arange(len(piece) - 1), piece[1:]])[counted].sum()
        size = len(text.encode())
        assert (row["tokens"], row["bytes"]) == (len(tokens) - 2, size)
        assert row["nats"] == pytest.approx(nats, **CLOSE)
        assert row["bits_per_byte"] == pytest.approx(nats / np.log(2) / size, **CLOSE)
    assert max(row["tokens"] for row in found) > 16


def test_proposals_are_the_likeliest_tokens_at_each_mask_token(tmp_path):
    run, mask = tiny.write(tmp_path / "run", "proposals"), tokenizer().mask_id
    rows = [
        {"text": "The <|mask|> fox<|mask|>"},
        {"text": "fox"},
        {"text": "<|mask|>"},
        {"text": "<|mask|>" + "x" * 20},
    ]
    found = predicted(run, rows, "--top_k=3")
    encode = tokenizer().encode
    documents = {0: [1, *encode("The"), mask, *encode(" fox"), mask, 2], 2: [1, mask, 2]}
    for number, tokens in documents.items():
        shares = softmax(tiny.logits("proposals", np.array(tokens)))[np.array(tokens) == mask]
        assert len(found[number]["proposals"]) == len(shares)
        for each, expected in zip(found[number]["proposals"], shares, strict=True):
            best = np.argsort(-expected)[:3]
            assert [one["probability"] for one in each] == pytest.approx(expected[best].tolist(), **CLOSE)
            names = [tokenizer().decode([token]) or tokenizer().tokens[token] for token in best]
            assert [one["token"] for one in each] == names
    assert [row["error"] for row in found] == [
        None,
        "no mask token '<|mask|>'",
        None,
        "longer than the window of 16 tokens",
    ]


CONTEXT = "The naïve 数学 fox 🙂 jumps over"


def test_characters_that_a_token_cuts_are_not_in_the_span():
    context = "a数学🙂b"
    found = encoded({"question": "q", "context": context, "answers": []}, tiny.SOURCES["spans"], BYTES)
    item, first = Item(0, {"context": context}, found), found.note["context"]
    whole = context.encode()
    for start in range(len(whole)):
        for stop in range(start + 1, len(whole) + 1):
            begin, end = characters(item, first + start, first + stop - 1, BYTES)
            expected = whole[start:stop].decode(errors="ignore")
            assert context[begin:end] == expected and begin <= end


THRESHOLD = -2.0
QUESTIONS = [("fox?", CONTEXT), ("a", "the quick"), ("over?", CONTEXT * 2), ("x" * 40, CONTEXT), ("🙂", "数学" * 9)]


def test_spans_are_the_answers_of_the_evaluation_with_their_characters(tmp_path):
    rows = [{"question": question, "context": context} for question, context in QUESTIONS]
    run = tiny.write(tmp_path / "run", "spans")
    flags = ("--sequence_length=32", "--max_answer_tokens=6", f"--no_answer_threshold={THRESHOLD}")
    found = predicted(run, rows, *flags)
    cache = MemoryCache([encoded(row | {"answers": []}, tiny.SOURCES["spans"], tokenizer()) for row in rows])
    settings = {"options": span.Options("squad", 6, THRESHOLD), "tokenizer": tokenizer(), "length": 32}
    _, params = model(**tiny.MODELS["spans"])
    params = segmented(params, ((0, 3),))
    expected = span.predictions(make_context(span, cache, params=params, **settings, **tiny.MODELS["spans"]))
    assert [row["answer"] or "" for row in found] == expected
    assert found[3]["error"] == "question is longer than half of the window" and found[3]["start"] is None
    for row in found[:3] + found[4:]:
        assert row["error"] is None
        if row["answer"]:
            assert row["context"][row["start"] : row["end"]] == row["answer"]
        assert (row["score"] >= -THRESHOLD) == bool(row["answer"])
    assert {bool(row["answer"]) for row in found[:3]} == {True, False}


def greedy(tokens: list[int], most: int) -> str:
    """The continuation of a prompt, one likeliest token after another."""
    made: list[int] = []
    for _ in range(most):
        made.append(int(tiny.logits("answers", np.array([*tokens, *made]))[-1].argmax()))
        if made[-1] == 2:
            return tokenizer().decode(made[:-1])
    return tokenizer().decode(made)


TURNS = [
    [("system", "be fox"), ("user", "hi 7")],
    [("user", "fox"), ("assistant", "over"), ("user", "more?")],
    [("user", "fox"), ("assistant", "left out")],
]


def test_answers_continue_a_dialogue_as_it_was_trained_up_to_the_last_answer(tmp_path):
    rows = [{"turns": [{"role": role, "content": content} for role, content in turns]} for turns in TURNS]
    found = predicted(tiny.write(tmp_path / "run", "answers", SPELLED), rows, "--max_tokens=6", "--sequence_length=96")
    for turns, row in zip(TURNS, found, strict=True):
        asked = turns[:-1] if turns[-1][0] == "assistant" else turns
        messages = [{"role": role, "content": content} for role, content in [*asked, ("assistant", "yes")]]
        trained = encoded({"messages": messages}, TALK, tokenizer(), SPELLED)
        last = np.flatnonzero(~trained.answer_mask)[-1] + 1
        assert row["answer"] == greedy(trained.tokens[:last].tolist(), 6)
        assert not row["truncated"]
    drawn = ("--max_tokens=6", "--temperature=2", "--sequence_length=96")
    twice = [*rows, rows[0]]
    runs = [predicted(tmp_path / "run", twice, *drawn, *more, name=f"{i}.jsonl") for i, more in enumerate(DRAWS)]
    texts = [[row["answer"] for row in each] for each in runs]
    assert texts[0] == texts[1] != texts[2] and texts[0][0] != texts[0][-1]
    assert texts[0] != [row["answer"] for row in found]


DRAWS = ([], ["--batch_size=8"], ["--seed=1"])


def test_a_stage_of_texts_continues_them_and_reads_the_end_of_a_long_one(tmp_path):
    flags = ("--what=answers", "--max_tokens=6")
    found = predicted(
        tiny.write(tmp_path / "run", "scores", sources={"task": SourceConfig("x", text="t")}),
        rows_of(["fox", "the quick brown fox jumps"], "t"),
        *flags,
    )
    encode = tokenizer().encode
    assert found[0]["answer"] == greedy([1, *encode("fox")], 6) and not found[0]["truncated"]
    assert found[1]["answer"] == greedy([1, *encode("the quick brown fox jumps")[-9:]], 6) and found[1]["truncated"]


def test_scores_of_dialogues_are_those_of_their_answers(tmp_path):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "fox"}]
    flags = ("--what=scores", "--sequence_length=64")
    [row] = predicted(tiny.write(tmp_path / "run", "answers"), [{"turns": turns}], *flags)
    tokens = np.array([1, *tokenizer().encode("hi"), *tokenizer().encode("fox"), 2])
    (fox,) = tokenizer().encode("fox")
    shares = softmax(tiny.logits("answers", tokens[:-1]))
    assert (row["tokens"], row["bytes"]) == (1, 3)
    assert row["nats"] == pytest.approx(-np.log(shares[-2, fox]), **CLOSE)


def test_a_prompt_ends_where_the_answer_of_training_begins():
    for template in ("", SPELLED):
        for turns in TURNS[:2]:
            whole = dialogue.encode(
                {"turns": [*turns, ("assistant", "yes")], "references": ["yes"]}, tokenizer(), template
            )
            prompt = dialogue.encode_prompt({"turns": turns}, tokenizer(), template)
            first = int(np.flatnonzero(~whole.answer_mask)[-1]) + 1
            assert prompt.tokens.tolist() == whole.tokens[:first].tolist()

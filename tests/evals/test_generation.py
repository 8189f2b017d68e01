"""Written answers: those of one prompt at a time, whatever the batch, and scored as SQuAD and ROUGE-L are."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm3.data.formats import Document
from llm3.distributed.sharding import place_batch
from llm3.errors import UserError
from llm3.evals import generation
from llm3.models.batching import sample
from tests.helpers.meshes import mesh_of
from tests.helpers.tiny import make_params, model_config
from tests.helpers.tiny_answers import DIALOGUE, TALK, AnswerCache, encoded, questions
from tests.helpers.tiny_cache import BYTES, COUNTED, make_context

MODEL = {"layers": 2, "tie_embeddings": False}
CONFIG = model_config(vocab_size=BYTES.vocab_size, **MODEL)
PARAMS = make_params(CONFIG, seed=3)
QUESTIONS = ["a", "b", "c", "what " * 9, "why? " * 9, "where" * 9, "x" * 80]
PAIRS = [(question, "an answer") for question in QUESTIONS]
LENGTH, MAX_TOKENS = 96, 12
OPTIONS = generation.Options(max_tokens=MAX_TOKENS)
COMPILED: dict = {}


def evaluation_of(cache, **options):
    fields = {"params": PARAMS, "length": LENGTH, "options": OPTIONS, **MODEL}
    made = make_context(generation, cache, **fields | options)
    return made if "place" in options else dataclasses.replace(made, compiled=COMPILED)


def written(cache, **options) -> list[str]:
    test = evaluation_of(cache, **options)
    width = test.config.sequence_length - test.options.max_tokens
    asked = [generation.read_question(test, index, width) for index in range(cache.documents)]
    return [each.text for each in generation.generate_answers(test, asked, width)]


@functools.cache
def one_by_one() -> list[str]:
    prompts = [[BYTES.bos_id, *BYTES.encode(question)] for question, _ in PAIRS]
    made = [
        sample(PARAMS, CONFIG, prompt, max_tokens=MAX_TOKENS, stops=[[BYTES.eos_id]], temperature=0)
        for prompt in prompts
    ]
    return [BYTES.decode(each) for each in made]


@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_answers_are_those_of_greedy_sampling_one_prompt_at_a_time_whatever_the_batch(batch_size):
    COUNTED.clear()
    assert written(questions(PAIRS, BYTES), batch_size=batch_size) == one_by_one()
    assert {"documents": len(PAIRS)} == COUNTED
    assert len(set(one_by_one())) > 5


def test_answers_do_not_depend_on_the_order_of_prompts():
    assert written(questions(PAIRS[::-1], BYTES)) == one_by_one()[::-1]


def test_answers_do_not_depend_on_the_number_of_devices():
    mesh = mesh_of(8, data=4, tensor=2)
    with jax.set_mesh(mesh):
        assert written(questions(PAIRS[:3], BYTES), place=lambda tree: place_batch(mesh, tree)) == one_by_one()[:3]


def test_an_answer_ends_at_the_first_end_or_eos():
    prompt = [BYTES.bos_id, *BYTES.encode("a")]
    made = sample(PARAMS, CONFIG, prompt, max_tokens=MAX_TOKENS, temperature=0)
    documents, ends = [], [[made[4]], [made[5], made[6]]]  # as a template may write them instead of <eos>
    for end in ends:
        tokens = np.array([*prompt, 9, *end], np.int32)
        documents.append(Document(tokens, np.arange(len(tokens)) >= 2, 3, note={"end": end}))
    first = [next(at for at in range(len(made)) if made[at : at + len(end)] == end) for end in ends]
    assert written(AnswerCache(documents)) == [BYTES.decode(made[:stop]) for stop in first]
    kernel, pair = np.array(PARAMS["lm_head"]["kernel"]), [BYTES.eos_id, made[2]]
    kernel[:, pair] = kernel[:, pair[::-1]]  # <eos> instead of the third token
    params = PARAMS | {"lm_head": {"kernel": kernel}}
    assert written(AnswerCache(documents), params=params) == [BYTES.decode(made[: made.index(made[2])])] * 2


def test_a_conversation_is_asked_for_its_last_answer():
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "right")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    asked = generation.read_question(evaluation_of(AnswerCache([encoded(row, TALK, BYTES)])), 0, 50)
    assert asked.prompt == [BYTES.bos_id, *BYTES.encode("ab"), BYTES.eos_id, *BYTES.encode("c")]
    assert asked.references == ["right"] and not asked.truncated


def test_a_long_prompt_keeps_its_last_tokens_behind_bos_and_is_counted():
    cache = questions([("0123456789", "yes"), ("0", "no")], BYTES)
    test = evaluation_of(cache, length=MAX_TOKENS + 6)
    assert generation.read_question(test, 0, 6).prompt == [BYTES.bos_id, *BYTES.encode("56789")]
    assert generation.evaluate(test)["truncated"] == 1
    with pytest.raises(UserError, match=r"sequence_length=13: expected max_tokens=12 and at least 2"):
        generation.evaluate(evaluation_of(cache, length=13))


def test_metrics_are_means_over_the_items_beside_the_best_constant_answer():
    right = one_by_one()
    answers = [["nothing like it", text] for text in right[:2]] + [["the Same!", "other"]] * 5
    rows = [{"question": each, "answer": several} for each, several in zip(QUESTIONS, answers, strict=True)]
    cache = AnswerCache([encoded(row, DIALOGUE, BYTES) for row in rows])
    found = generation.evaluate(evaluation_of(cache))
    columns = found["predictions"]
    assert found["exact_match"] == columns["score"].mean()
    assert [found[name] for name in ("f1", "rouge_l")] == [columns[name].mean() for name in ("f1", "rouge_l")]
    assert found["exact_match"] == pytest.approx(2 / 7)
    assert found["majority_exact_match"] == pytest.approx(5 / 7)
    assert found["items"] == 7 and found["truncated"] == 0
    assert 2 / 7 <= found["f1"] < 0.5 and 2 / 7 <= found["rouge_l"] < 0.5
    assert len(found["examples"]) == 5
    assert found["examples"][3] == {"prompt": QUESTIONS[3], "answer": "the Same!", "generated": right[3]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The cat's  hat, an apple.", "cats hat apple"),  # the official script joins what a mark divided
        ("A\tB\nthe", "b"),
        ("theatre another", "theatre another"),
        ("U.S.-based", "usbased"),
        ("北京。「上海」！", "北京上海"),  # noqa: RUF001
        ("", ""),
    ],
)
def test_texts_are_normalised_as_squad_does(text, expected):
    assert generation.normalised(text) == expected


@pytest.mark.parametrize(
    ("text", "reference", "exact", "f1"),
    [
        ("The Cat!", "cat", 1, 1),
        ("black cat", "a cat", 0, 2 / 3),  # precision 1/2, recall 1
        ("cat cat dog", "cat dog dog", 0, 2 / 3),  # two in common
        ("dog", "cat", 0, 0),
        ("the", "a", 1, 1),  # nothing is left of either
        ("the", "cat", 0, 0),
        ("北京市", "北京", 0, 4 / 5),  # 2 of 3 characters, 2 of 2
        ("在2020年", "2020 年", 0, 4 / 5),
    ],
)
def test_exact_match_and_token_f1_by_hand(text, reference, exact, f1):
    found = generation.score(text, [reference])
    assert (found["exact_match"], found["f1"]) == (exact, pytest.approx(f1))


def test_the_best_reference_counts_for_each_metric():
    found = generation.score("red green blue", ["green", "blue green red", "red green blue"])
    assert found == {"exact_match": 1, "f1": 1, "rouge_l": 1}
    assert generation.score("red green", ["x", "green red"]) == {
        "exact_match": 0,
        "f1": 1,
        "rouge_l": pytest.approx(0.5),
    }


def longest_common(a: list[str], b: list[str]) -> int:
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return 1 + longest_common(a[:-1], b[:-1])
    return max(longest_common(a[:-1], b), longest_common(a, b[:-1]))


@settings(max_examples=60, deadline=None)
@given(*[st.lists(st.sampled_from(["cat", "dog", "Ox", "京", "the"]), max_size=6)] * 2)
def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence_in_any_script(a, b):
    left, right = (generation.words(" ".join(each)) for each in (a, b))
    common = longest_common(left, right)
    expected = 2 * common / (len(left) + len(right)) if common else 0
    assert generation.rouge_l(" ".join(a), [" ".join(b)]) == pytest.approx(expected)

"""Multiple choice by likelihood against hand computations, however choices are packed and batched."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import sklearn.metrics

from llm3.config.data_schema import SourceConfig
from llm3.data import tokenizer
from llm3.distributed.sharding import place_batch
from llm3.errors import UserError
from llm3.evals import choice
from tests.helpers import reference
from tests.helpers.meshes import mesh_of
from tests.helpers.tiny import make_params, make_row, model_config
from tests.helpers.tiny_answers import AnswerCache, encoded
from tests.helpers.tiny_cache import COUNTED, make_context, without_predictions

TOKENIZER = tokenizer.train(["Is it so? Answer: yes Answer: no Answer: maybe not "] * 9, 330)
CONFIG = model_config(vocab_size=TOKENIZER.vocab_size, layers=2)
PARAMS = make_params(CONFIG, seed=1)
FIXED = SourceConfig("x", prompt="{q}\nAnswer: ", choices=["yes", "no", "maybe not"], answer="label")
OWN = SourceConfig("x", prompt="q", choices="options", answer="label")
ROWS = [
    {"q": f"Is {name} so?", "label": number % 3} for number, name in enumerate(["it", "yes", "no so", "?", "A", "i"])
]
OWN_ROWS = [
    {"q": "Is it", "options": [" so", " not so", " maybe so?"], "label": 2},
    {"q": "A", "options": ["nswer", "b"], "label": 0},
    {"q": "It is so", "options": ["?", "!", " no"], "label": 0},
]
LENGTH = 48
MODEL = {"params": PARAMS, "layers": 2, "tokenizer": TOKENIZER}
COMPILED: dict = {}


def cache_of(rows, source) -> AnswerCache:
    return AnswerCache([encoded(row, source, TOKENIZER) for row in rows])


def metrics(rows, source, **options) -> dict:
    return without_predictions(evaluated(rows, source, **options))


def evaluated(rows, source, **options) -> dict:
    return choice.evaluate(make_context(choice, cache_of(rows, source), **{**MODEL, "length": LENGTH} | options))


@functools.cache
def by_hand(prompt: str, answer: str) -> float:
    """log p of the tokens that hold a byte of the answer, by way of decoded texts."""
    tokens = [TOKENIZER.bos_id, *TOKENIZER.encode(prompt + answer)]
    row = make_row(np.array(tokens), length=LENGTH)
    logits = reference.row_logits(CONFIG, PARAMS, reference.row_hidden(CONFIG, PARAMS, row))
    inside = [n for n in range(1, len(tokens)) if len(TOKENIZER.decode(tokens[: n + 1])) > len(prompt)]
    return -sum(float(reference.nats(logits[n - 1], np.array(tokens[n]))) for n in inside)


def scores_by_hand(rows, source, neutral: str = "Answer:") -> dict[str, list[list[float]]]:
    found = {"accuracy": [], "per_character_accuracy": [], "unconditional_accuracy": []}
    for row in rows:
        prompt, space = (f"{row['q']}\nAnswer: ", " ") if source is FIXED else (row["q"], "")
        choices = row.get("options") or source.choices
        raw = [by_hand(prompt, each) for each in choices]
        found["accuracy"].append(raw)
        found["per_character_accuracy"].append([a / len(b) for a, b in zip(raw, choices, strict=True)])
        prior = [by_hand(neutral + space, each) for each in choices]
        found["unconditional_accuracy"].append([a - b for a, b in zip(raw, prior, strict=True)])
    return found


@pytest.mark.parametrize(("rows", "source"), [(ROWS, FIXED), (OWN_ROWS, OWN)])
def test_metrics_are_those_of_a_hand_computation(rows, source):
    right = [row["label"] for row in rows]
    scores = scores_by_hand(rows, source)
    chosen = {name: [np.argmax(each) for each in lists] for name, lists in scores.items()}
    expected = {name: np.mean(np.array(each) == right) for name, each in chosen.items()}
    if source is FIXED:
        expected["macro_f1"] = sklearn.metrics.f1_score(right, chosen["accuracy"], average="macro")
    expected |= {"majority_accuracy": max(right.count(each) for each in right) / len(right)}
    COUNTED.clear()
    found = evaluated(rows, source)
    distinct = 1 if source is FIXED else len({tuple(row["options"]) for row in rows})
    assert {"documents": len(rows) + distinct} == COUNTED, "of the neutral prompt and of each item"
    columns = found.pop("predictions")
    assert found == pytest.approx(expected | {"items": len(rows), "truncated": 0})
    by_row = np.argsort(cache_of(rows, source).rows)
    choices = [row.get("options") or source.choices for row in rows]
    for name, numbers in (("truth", right), ("prediction", chosen["accuracy"])):
        assert columns[name] == [choices[place][numbers[place]] for place in by_row]
    assert found["accuracy"] == columns["score"].mean() == np.mean(np.equal(columns["truth"], columns["prediction"]))
    assert found["per_character_accuracy"] == columns["per_character_accuracy"].mean()
    nats = [-scores["accuracy"][place][right[place]] for place in by_row]
    np.testing.assert_allclose(columns["nats"], nats, rtol=1e-4)
    powers = np.exp(scores["accuracy"][by_row[0]])
    assert columns["confidence"][0] == pytest.approx(powers.max() / powers.sum(), rel=1e-4)


@pytest.mark.parametrize(
    ("rows", "source", "neutral"), [(ROWS, FIXED, "Answer:"), (ROWS, FIXED, "so so"), (OWN_ROWS, OWN, "Answer:")]
)
def test_choices_are_scored_by_the_sum_per_character_and_over_a_neutral_prompt(rows, source, neutral):
    cache = cache_of(rows, source)
    test = make_context(choice, cache, options=choice.Options(neutral=neutral), **MODEL, length=LENGTH)
    found, _ = choice.score_choices(test, [cache.note(index) for index in range(len(rows))])
    for name, lists in scores_by_hand(rows, source, neutral).items():
        for one, other in zip(found[name], lists, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


ASKED = [
    ("Is it so?\nAnswer: ", FIXED.choices),
    ("A", ["nswer: yes", "b", "Answer"]),
    ("It is", [" so", " so so", " not so", "o"]),  # choices that begin alike, and a token that only one of them has
    ("Is it so? " * 3, ["yes", "no"]),
]


def likelihoods(length=LENGTH, batch_size=4, **options) -> np.ndarray:
    cache = cache_of(ROWS, FIXED)
    test = make_context(choice, cache, **MODEL, length=length, batch_size=batch_size, **options)
    test = test if options else dataclasses.replace(test, compiled=COMPILED)
    items = [choice.encode([TOKENIZER.bos_id, prompt], choices, TOKENIZER, length) for prompt, choices in ASKED]
    return np.concatenate(choice.log_likelihoods(test, items))


def test_a_likelihood_is_that_of_the_jointly_encoded_tokens_of_the_choice():
    expected = [by_hand(prompt, answer) for prompt, choices in ASKED for answer in choices]
    np.testing.assert_allclose(likelihoods(), expected, rtol=1e-5)
    apart = TOKENIZER.encode("Answer: ") + TOKENIZER.encode("yes")
    assert TOKENIZER.encode("Answer: yes") != apart  # so that the statement above says something


@pytest.mark.parametrize(("length", "batch_size"), [(40, 1), (120, 8)])
def test_a_likelihood_does_not_depend_on_length_padding_or_batch(length, batch_size):
    np.testing.assert_allclose(likelihoods(length, batch_size), likelihoods(), rtol=1e-5)


def test_a_likelihood_does_not_depend_on_the_number_of_devices():
    mesh = mesh_of(4, data=4)
    with jax.set_mesh(mesh):
        found = likelihoods(place=lambda tree: place_batch(mesh, tree))
    np.testing.assert_allclose(found, likelihoods(), rtol=1e-5)


def test_a_long_prompt_loses_its_beginning_for_all_choices_alike_and_is_counted():
    long = "Is it so? " * 30
    found = choice.encode([TOKENIZER.bos_id, long], ["yes", "maybe not"], TOKENIZER, 10)
    for answer, tail in zip(["yes", "maybe not"], found.tails, strict=True):
        whole, most = TOKENIZER.encode(long + answer), TOKENIZER.encode(long + "maybe not")
        assert [*found.prompt, *tail] == [TOKENIZER.bos_id, *whole[len(most) - 10 :]]
    assert len(found.prompt) + max(map(len, found.tails)) == 11 and found.truncated
    assert metrics([*ROWS, {"q": long, "label": 0}], FIXED)["truncated"] == 1


def test_a_choice_that_does_not_fit_is_refused():
    with pytest.raises(
        UserError, match=r"sequence_length=8: expected room for a part of the prompt and the choice 'zxq"
    ):
        metrics([{"q": "a", "options": ["b", "zxq" * 9], "label": 0}], OWN, length=8)

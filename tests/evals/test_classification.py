"""Classification metrics against scikit-learn and hand computations, however documents are batched and placed."""

import functools
import json

import jax
import numpy as np
import pytest
import sklearn.metrics

from llm3.distributed.sharding import place_batch, tree_shardings
from llm3.evals import classification
from llm3.models.transformer import abstract
from llm3.segments import segmented
from tests.helpers import reference
from tests.helpers.tiny import CLASSES, make_params, model_config
from tests.helpers.tiny_cache import BYTES, MemoryCache, make_context, plain, without_predictions

NAMES = ["ache", "burn", "cut", "dent", "easy"]
SETS = [[], [0], [0, 2], [1, 3, 4], [4]]  # the last class is in two of them
VOCAB = 64
MODELS = {"decoder": {"causal": True, "pool": "last"}, "encoder": {"causal": False, "pool": "mean"}}
each_model = pytest.mark.parametrize("kind", MODELS)


@functools.cache
def cache(several: bool = False) -> MemoryCache:
    rng = np.random.default_rng(1)
    documents = [plain(1, *rng.integers(4, VOCAB, rng.integers(1, 9)), BYTES.eos_id) for _ in range(60)]
    labels = rng.integers(0, CLASSES - 1, 60)  # one class never occurs
    return MemoryCache(documents, labels, NAMES, SETS if several else None)


def measured(kind: str, several: bool = False, **changes):
    return make_context(classification, cache(several), vocab_size=VOCAB, classes=CLASSES, **MODELS[kind], **changes)


@functools.cache
def logits_by_hand(kind: str) -> np.ndarray:
    """[documents, classes]: each document alone."""
    config = model_config(vocab_size=VOCAB, classes=CLASSES, **MODELS[kind])
    params, found = make_params(config), []
    for index in range(cache().documents):
        tokens = cache().document(index)
        row = reference.Batch(tokens, np.arange(len(tokens)), np.ones_like(tokens), 0 * tokens, 0 * tokens)
        hidden = reference.row_hidden(config, params, row)
        found.append(reference.row_class_logits(config, params, hidden, row)[-1])
    return np.array(found)


def probabilities_by_hand(kind: str) -> np.ndarray:
    powers = np.exp(logits_by_hand(kind))
    return powers / powers.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize(("kind", "batch_size"), [("decoder", 1), ("encoder", 32)])
def test_metrics_of_single_labels_agree_with_scikit_learn(kind, batch_size):
    true, found = cache().labels, classification.evaluate(measured(kind, batch_size=batch_size))
    p = probabilities_by_hand(kind)
    predicted, all_classes = p.argmax(axis=-1), range(CLASSES)
    assert 0 < np.sum(true == predicted) < len(true)
    assert found["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(true, predicted))
    assert found["macro_f1"] == pytest.approx(sklearn.metrics.f1_score(true, predicted, average="macro"))
    assert found["majority_accuracy"] == pytest.approx(np.bincount(true).max() / len(true))
    assert found["nll"] == pytest.approx(sklearn.metrics.log_loss(true, p, labels=all_classes), rel=1e-5)
    assert found["brier"] == pytest.approx(np.sum((p - np.eye(CLASSES)[true]) ** 2, axis=-1).mean(), rel=1e-5)
    assert found["items"] == len(true)
    matrix = sklearn.metrics.confusion_matrix(true, predicted, labels=all_classes)
    assert found["confusion"] == {"classes": NAMES, "counts": matrix.tolist()}
    report = sklearn.metrics.classification_report(
        true, predicted, labels=all_classes, target_names=NAMES, output_dict=True, zero_division=0
    )
    for name in NAMES:
        expected = {key.removesuffix("-score"): value for key, value in report[name].items()}
        assert found["per_class"][name] == pytest.approx(expected)


def calibration_error(true: np.ndarray, p: np.ndarray) -> float:
    """Guo et al. 2017, section 2, bin by bin."""
    confidence, right, error = p.max(axis=-1), p.argmax(axis=-1) == true, 0.0
    for m in range(15):
        inside = (confidence > m / 15) & (confidence <= (m + 1) / 15)
        if inside.any():
            error += inside.sum() / len(true) * abs(right[inside].mean() - confidence[inside].mean())
    return error


def test_metrics_of_single_labels_can_be_computed_from_the_predictions():
    found = classification.evaluate(measured("decoder"))
    columns = found["predictions"]
    truth, p = columns["truth"], columns["probabilities"]
    assert columns["item"].tolist() == sorted(cache().rows)
    assert truth == [NAMES[cache().labels[place]] for place in np.argsort(cache().rows)]
    assert columns["prediction"] == [NAMES[each] for each in p.argmax(axis=-1)]
    assert found["accuracy"] == columns["score"].mean() == sklearn.metrics.accuracy_score(truth, columns["prediction"])
    assert found["macro_f1"] == pytest.approx(sklearn.metrics.f1_score(truth, columns["prediction"], average="macro"))
    assert found["nll"] == pytest.approx(sklearn.metrics.log_loss(truth, p, labels=NAMES))
    assert found["nll"] == pytest.approx(columns["nats"].mean(), rel=1e-12)
    true = np.array([NAMES.index(each) for each in truth])
    assert found["brier"] == pytest.approx(np.sum((p - np.eye(CLASSES)[true]) ** 2, axis=-1).mean())
    assert found["ece"] == pytest.approx(calibration_error(true, p), abs=1e-6)
    assert columns["confidence"].astype(np.float32).tolist() == p.max(axis=-1).tolist() and columns["classes"] == NAMES


@each_model
def test_the_calibration_error_is_of_fifteen_bins_over_the_whole_set(kind):
    p, true = probabilities_by_hand(kind), cache().labels
    expected = calibration_error(true, p)
    found = classification.evaluate(measured(kind, batch_size=32))
    assert found["ece"] == pytest.approx(expected, abs=1e-5)
    by_halves = np.mean([calibration_error(true[half], p[half]) for half in (slice(0, 30), slice(30, 60))])
    assert abs(by_halves - expected) > 1e-3


def test_confidences_are_told_apart_up_to_one():
    confidences, right = np.array([0.92, 0.98, 1.0]), np.array([False, True, True])
    assert classification.calibration_error(confidences, right) == pytest.approx((0.92 + 0.02 + 0) / 3)


@pytest.mark.parametrize(("kind", "batch_size"), [("decoder", 1), ("encoder", 32)])
def test_metrics_of_several_labels_agree_with_scikit_learn(kind, batch_size):
    found = classification.evaluate(measured(kind, several=True, batch_size=batch_size))
    true = classification.multi_hot(SETS, CLASSES)[cache().labels]
    p = 1 / (1 + np.exp(-logits_by_hand(kind)))
    predicted = (p > 0.5).astype(int)
    assert 0 < np.sum(true == predicted) < true.size
    measures = {
        name: sklearn.metrics.f1_score(true, predicted, average=name, zero_division=0) for name in ("micro", "macro")
    }
    assert (found["micro_f1"], found["macro_f1"]) == pytest.approx(tuple(measures.values()))
    assert found["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(true, predicted))
    nats = -np.where(true > 0, np.log(p), np.log(1 - p)).mean()
    assert (found["nll"], found["items"]) == (pytest.approx(nats, rel=1e-5), 60)
    columns = sklearn.metrics.precision_recall_fscore_support(true, predicted, zero_division=0)
    for name, *expected in zip(NAMES, *columns, strict=True):
        assert list(found["per_class"][name].values()) == pytest.approx(expected)
    assert not {"confusion", "brier", "ece", "majority_accuracy"} & found.keys()
    columns, members = found["predictions"], lambda text: [NAMES.index(each) for each in json.loads(text)]
    order = np.argsort(cache(several=True).rows)
    assert [members(each) for each in columns["truth"]] == [SETS[label] for label in cache().labels[order]]
    assert [members(each) for each in columns["prediction"]] == [
        np.flatnonzero(p[each] > 0.5).tolist() for each in order
    ]
    assert (found["accuracy"], found["nll"]) == pytest.approx((columns["score"].mean(), columns["nats"].mean()))


def test_label_sets_that_training_never_had_are_those_of_the_evaluated_documents():
    other = [[3], [0, 1, 2, 3, 4]]
    documents = [plain(*cache().document(index)) for index in range(20)]
    new = MemoryCache(documents, [0, 1] * 10, NAMES, other)
    found = classification.evaluate(
        make_context(classification, new, vocab_size=VOCAB, classes=CLASSES, **MODELS["encoder"])
    )
    assert [each["support"] for each in found["per_class"].values()] == [10, 10, 10, 20, 10]


def test_metrics_of_counts_agree_with_scikit_learn_also_for_classes_that_never_occur():
    true, predicted = np.array([0, 0, 0, 1, 1, 3]), np.array([0, 0, 1, 1, 4, 0])
    logits = np.log(0.1 + 0.4 * np.eye(6)[predicted])  # 0.5 for the predicted class, 0.1 for each other one
    found = classification.single_label_metrics(logits, true, list("abcdef"))
    assert found["accuracy"] == pytest.approx(0.5)
    expected = sklearn.metrics.f1_score(true, predicted, average="macro", zero_division=0)
    assert found["macro_f1"] == pytest.approx(expected)
    assert (found["majority_accuracy"], found["items"]) == (0.5, 6)
    assert found["nll"] == pytest.approx(-(np.log(0.5) + np.log(0.1)) / 2)
    assert found["brier"] == pytest.approx((0.25 + 5 * 0.01 - 0.01 + 0.01 + 0.25 + 0.81 + 4 * 0.01) / 2)
    assert found["per_class"]["f"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}


def test_no_constant_answer_beats_the_majority():
    constants = [np.mean(cache().labels == guess) for guess in range(CLASSES)]
    assert classification.evaluate(measured("decoder"))["majority_accuracy"] == pytest.approx(max(constants))


@pytest.mark.parametrize("several", [False, True])
def test_metrics_are_the_same_on_eight_devices(eight_devices, several):
    config = model_config(vocab_size=VOCAB, classes=CLASSES)
    whole, params = abstract(config), segmented(make_params(config), ((0, config.layers),))
    expected = classification.evaluate(measured("decoder", several))
    with jax.set_mesh(eight_devices):
        placed = jax.tree.map(jax.device_put, params, tree_shardings(eight_devices, whole.shapes, whole.axes))
        place = functools.partial(place_batch, eight_devices)
        found = classification.evaluate(measured("decoder", several, params=placed, place=place, batch_size=8))
    for name, values in found.pop("predictions").items():
        expected_values = expected["predictions"][name]
        if isinstance(values, np.ndarray):
            np.testing.assert_allclose(values, expected_values, rtol=1e-4)
        else:
            assert values == expected_values
    for name, value in without_predictions(expected).items():
        if isinstance(value, (int, float)):
            assert found[name] == pytest.approx(value, rel=1e-4), name
        else:
            assert found[name] == value

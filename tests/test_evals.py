"""Figures of a model against hand computations over tokens in numpy, however the text is batched, packed or placed."""

import functools
import math

import jax
import numpy as np
import pytest
import reference
import sklearn.metrics
from tiny import CLASSES, make_documents, make_labelled, make_params, make_row, model_config, stack

from llm3 import evals
from llm3.data.batch import Batch
from llm3.evals import classification, perplexity
from llm3.models.transformer import abstract, segmented
from llm3.sharding import place_batch, tree_shardings

BYTES = np.random.default_rng(3).integers(1, 5, 64).astype(np.int32)
BYTES[:4] = 0  # special tokens
DOCUMENTS = make_documents(16, seed=5)
EMPTY = make_row()


@functools.cache
def model(classes: int = 0):
    """(config, canonical params, abstract) of a tiny model."""
    config = model_config(vocab_size=64, classes=classes)
    return config, make_params(config), abstract(config)


@functools.cache
def eval_step(peer, classes: int = 0):
    return evals.make_eval_step(peer, model(classes)[2].graph, BYTES)


def figures(peer, batches: list[Batch], params: dict, classes: int = 0) -> dict[str, float]:
    config = model(classes)[0]
    return evals.evaluate(peer, eval_step(peer, classes), segmented(params, ((0, config.layers),)), batches)


def batches_of(rows: list[Batch], size: int) -> list[Batch]:
    rows = rows + [EMPTY] * (-len(rows) % size)
    return [stack(*rows[i : i + size]) for i in range(0, len(rows), size)]


def packed(pairs: int) -> list[Batch]:
    """The documents, `pairs` of them in each row."""
    return [make_row(*DOCUMENTS[i : i + pairs]) for i in range(0, len(DOCUMENTS), pairs)]


@functools.cache
def bits_per_byte_by_hand() -> float:
    config, params, _ = model()
    nats = length = 0.0
    for document in DOCUMENTS:
        row = make_row(document)
        logits = reference.row_logits(config, params, reference.row_hidden(config, params, row))
        for t in range(len(document) - 1):
            target = document[t + 1]
            if BYTES[target]:
                nats += reference.nats(logits[t], np.array(target))
                length += BYTES[target]
    return nats / (math.log(2) * length)


@pytest.mark.parametrize(("in_a_row", "batch_size"), [(1, 4), (2, 4), (2, 8)])
def test_bits_per_byte_is_total_nats_over_total_bytes_however_batched_and_packed(in_a_row, batch_size):
    found = figures(perplexity, batches_of(packed(in_a_row), batch_size), model()[1])
    assert found == {"bits_per_byte": pytest.approx(bits_per_byte_by_hand(), rel=1e-5)}


def test_a_mean_of_batch_means_would_be_another_figure():
    by_batch = [figures(perplexity, [batch], model()[1])["bits_per_byte"] for batch in batches_of(packed(1), 4)]
    assert abs(np.mean(by_batch) / bits_per_byte_by_hand() - 1) > 1e-3


def test_bits_per_byte_is_the_same_on_eight_devices(eight_devices):
    _, params, whole = model()
    cut = segmented(params, ((0, 3),))
    with jax.set_mesh(eight_devices):
        placed = jax.tree.map(jax.device_put, cut, tree_shardings(eight_devices, whole.shapes, whole.axes))
        batches = [place_batch(eight_devices, batch) for batch in batches_of(packed(2), 8)]
        step = evals.make_eval_step(perplexity, whole.graph, BYTES)
        found = evals.evaluate(perplexity, step, placed, batches)
    assert found["bits_per_byte"] == pytest.approx(bits_per_byte_by_hand(), rel=1e-5)


def test_a_uniform_model_needs_log2_of_the_vocabulary_for_each_token():
    _, params, _ = model()
    uniform = {**params, "embed": {"embedding": np.zeros((64, 16), np.float32)}}
    targets = np.concatenate([document[1:] for document in DOCUMENTS])
    expected = math.log2(64) * np.sum(BYTES[targets] > 0) / BYTES[targets].sum()
    found = figures(perplexity, batches_of(packed(2), 4), uniform)
    assert found["bits_per_byte"] == pytest.approx(expected, rel=1e-6)


def test_special_tokens_count_neither_nats_nor_bytes():
    _, params, _ = model()
    plain = np.array([10, 20, 30, 40, 50])
    special = np.array([10, 20, 30, 40, 50, 2])  # its nats would be in the sum
    one, other = (figures(perplexity, [stack(make_row(each), *[EMPTY] * 3)], params) for each in (plain, special))
    assert one == other


def labelled_rows() -> list[Batch]:
    return reference.rows(make_labelled(8, seed=2))


@functools.cache
def labels_by_hand() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(true class, predicted class, nats) of every document."""
    config, params, _ = model(CLASSES)
    batch = stack(*labelled_rows())
    logits = reference.class_logits(config, params, batch)
    chosen = batch.weights > 0
    return batch.targets[chosen], logits[chosen].argmax(axis=-1), reference.nats(logits, batch.targets)[chosen]


@pytest.mark.parametrize("batch_size", [4, 8])
def test_classification_agrees_with_scikit_learn(batch_size):
    true, predicted, nats = labels_by_hand()
    assert 0 < np.sum(true == predicted) < len(true)
    found = figures(classification, batches_of(labelled_rows(), batch_size), model(CLASSES)[1], CLASSES)
    assert found == {
        "accuracy": pytest.approx(sklearn.metrics.accuracy_score(true, predicted)),
        "macro_f1": pytest.approx(sklearn.metrics.f1_score(true, predicted, average="macro")),
        "majority_accuracy": pytest.approx(np.bincount(true).max() / len(true)),
        "nll": pytest.approx(nats.mean(), rel=1e-5),
        "items": len(true),
    }


def test_figures_of_a_confusion_matrix_agree_with_scikit_learn_also_for_classes_that_never_occur():
    true, predicted = np.array([0, 0, 0, 1, 1, 3]), np.array([0, 0, 1, 1, 4, 0])
    confusion = sklearn.metrics.confusion_matrix(true, predicted, labels=range(6)).astype(float)
    found = classification.figures({"confusion": confusion, "nats": np.float64(6)})
    assert found["accuracy"] == pytest.approx(0.5)
    assert found["macro_f1"] == pytest.approx(
        sklearn.metrics.f1_score(true, predicted, average="macro", zero_division=0)
    )
    assert (found["majority_accuracy"], found["nll"], found["items"]) == (0.5, 1.0, 6)


def test_no_constant_answer_beats_the_majority():
    true = labels_by_hand()[0]
    constants = [np.mean(true == guess) for guess in range(CLASSES)]
    found = figures(classification, batches_of(labelled_rows(), 8), model(CLASSES)[1], CLASSES)
    assert found["majority_accuracy"] == pytest.approx(max(constants))


def test_sums_are_added_in_float64():
    step = lambda params, batch: {"nats": np.float32(batch), "bytes": np.float32(1)}  # noqa: E731
    # in float32, 2^24 + 1 is 2^24
    found = evals.evaluate(perplexity, step, {}, [2.0**24, 1.0, 1.0, 1.0])
    assert found["bits_per_byte"] == (2**24 + 3) / (4 * math.log(2))

"""Classification: one label or several, of texts and of pairs; what does not fit is cut at the ends of the texts."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from llm3.data.batch import Batch
from llm3.data.windows.examples import WindowTable, shortened
from llm3.errors import UserError
from llm3.models.transformer import abstract
from llm3.objectives import Task, classify
from llm3.segments import segmented
from tests.helpers import reference
from tests.helpers.tiny import CLASSES, jit, make_labelled, make_params, make_row, model_config, stack
from tests.helpers.tiny_cache import BYTES, MemoryCache, plain

BOS, EOS = BYTES.bos_id, BYTES.eos_id
SETS = np.array([[0, 0, 0, 0, 0], [1, 0, 1, 0, 0], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1], [0, 1, 0, 1, 0]], np.float32)
MODELS = {"decoder": {"causal": True, "pool": "last"}, "encoder": {"causal": False, "pool": "mean"}}
each_model = pytest.mark.parametrize("kind", MODELS)


@functools.cache
def run(kind: str, several: bool, max_output_positions: int = 0):
    """batch -> the sums of the objective."""
    config = model_config(classes=CLASSES, max_output_positions=max_output_positions, **MODELS[kind])
    graph, params = abstract(config).graph, make_params(config)
    task = Task(None, BYTES, 16, SETS if several else None)

    @jit
    def sums(params, batch):
        model = nnx.merge(graph, segmented(params, ((0, config.layers),)))
        return classify.loss(model, batch, jax.random.key(0), task)

    return lambda batch: jax.device_get(sums(params, batch))


def by_hand(kind: str, batch: Batch, several: bool) -> tuple[float, float, float]:
    config = model_config(classes=CLASSES, **MODELS[kind])
    logits = reference.class_logits(config, make_params(config), batch)
    chosen = batch.weights > 0
    logits, targets = logits[chosen], batch.targets[chosen]
    if not several:
        return reference.nats(logits, targets).sum(), len(targets), np.sum(logits.argmax(axis=-1) == targets)
    probabilities = 1 / (1 + np.exp(-logits))
    nats = -np.log(np.where(SETS[targets] > 0, probabilities, 1 - probabilities)).mean(axis=-1)
    return nats.sum(), len(targets), np.sum(np.all((probabilities > 0.5) == (SETS[targets] > 0), axis=-1))


@each_model
@pytest.mark.parametrize("several", [False, True])
def test_nats_and_accuracy_are_those_computed_by_hand(kind, several):
    batch = make_labelled(8, seed=3)
    found, (nats, weight, right) = run(kind, several)(batch), by_hand(kind, batch, several)
    assert found.loss == pytest.approx(nats, rel=1e-5)
    assert (found.weight, found.metrics["accuracy"]) == (weight, right)


def test_a_set_is_right_only_if_every_class_of_it_is():
    batch = make_labelled(1)
    logits = np.where(SETS[batch.targets] > 0, 3.0, -3.0).astype(np.float32)

    class Told:
        config = model_config(classes=CLASSES)

        def __call__(self, *_, key=None):
            return None, None

        def class_logits(self, *_):
            return logits

    task = Task(None, BYTES, 16, SETS)
    assert classify.loss(Told(), batch, None, task).metrics["accuracy"] == batch.weights.sum()
    first = np.flatnonzero(batch.weights[0])[0]
    logits[0, first, 2] *= -1
    found = classify.loss(Told(), batch, None, task)
    assert found.metrics["accuracy"] == batch.weights.sum() - 1
    wrong, right = np.log1p(np.exp(3)), np.log1p(np.exp(-3))
    assert found.loss == pytest.approx(right * batch.weights.sum() + (wrong - right) / CLASSES, rel=1e-5)


@pytest.mark.parametrize("several", [False, True])
def test_what_is_read_at_the_last_tokens_only_is_the_same(several):
    batch = make_labelled(4)
    whole, read = run("decoder", several)(batch), run("decoder", several, 2)(batch)
    assert read.loss == pytest.approx(whole.loss, rel=1e-5)
    assert (read.weight, read.metrics["accuracy"]) == (whole.weight, whole.metrics["accuracy"])


@each_model
@pytest.mark.parametrize("several", [False, True])
def test_packed_documents_have_the_losses_of_each_alone(kind, several):
    packed, alone = make_labelled(4), []
    for row in reference.rows(packed):
        for segment in (1, 2):
            here, window = row.segments == segment, make_row()
            for field, values in zip(window, row, strict=True):
                field[: here.sum()] = values[here]
            window.segments[: here.sum()] = 1
            alone.append(window)
    together = run(kind, several)(stack(*reference.rows(packed), *[make_row()] * 4))
    apart = run(kind, several)(stack(*alone))
    assert together.loss == pytest.approx(apart.loss, rel=1e-5)
    assert (together.weight, together.metrics) == (apart.weight, apart.metrics)


def text(size: int, first: int = 10) -> list[int]:
    return list(range(first, first + size))


def longest_first(one: list[int], other: list[int], room: int) -> tuple[list[int], list[int]]:
    """The rule of BERT's code, token by token."""
    while len(one) + len(other) > room:
        (one if len(one) > len(other) else other).pop()
    return one, other


@settings(deadline=None)
@given(st.integers(0, 12), st.integers(0, 12), st.integers(3, 30))
def test_of_a_pair_the_longer_text_is_cut_first(first, second, length):
    one, other = text(first), text(second, 50)
    whole = np.array([BOS, *one, EOS, *other, EOS])
    if len(whole) > length:
        one, other = longest_first(one, other, length - 3)
    assert shortened(whole, length, 1, EOS).tolist() == [BOS, *one, EOS, *other, EOS]


def test_a_single_text_keeps_its_beginning_and_its_end_token():
    assert shortened(np.array([BOS, *text(9), EOS]), 6, 1, EOS).tolist() == [BOS, *text(4), EOS]


def cache(labels=(2, 0, 1)) -> MemoryCache:
    documents = [plain(BOS, *text(3), EOS), plain(BOS, *text(9), EOS), plain(BOS, *text(6), EOS, *text(8), EOS)]
    return MemoryCache(documents, labels, ["a", "b", "c"])


def test_every_document_is_an_example_with_its_label_at_its_last_token():
    table = WindowTable(cache(), 10)
    assert (table.truncated, table.dropped, table.max_pieces) == (2, 0, 1)
    seen = {}
    for index in range(len(table)):
        window = table[index]
        for segment, document, (first, stop) in table.documents_of(index):
            here = window.segments == segment
            assert (first, stop) == (0, here.sum()) and window.tokens[here][0] == BOS
            assert np.flatnonzero(window.weights[here]).tolist() == [stop - 1]
            assert window.tokens[here][-1] == EOS
            seen[document] = int(window.targets[here][-1])
    assert seen == {0: 2, 1: 0, 2: 1}


def test_a_source_without_labels_is_refused():
    with pytest.raises(UserError, match="label"):
        WindowTable(cache(labels=None), 10)

"""Instruction tuning: the loss is that of the answers' tokens and ends, whatever shares a window with them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llm3 import objectives
from llm3.data import windows
from llm3.data.batch import Batch
from llm3.data.packing import empty_window
from llm3.models.transformer import abstract
from llm3.objectives import causal, instruct
from llm3.registry import load_plugin
from llm3.segments import segmented
from tests.helpers import reference
from tests.helpers.tiny import jit, make_params, model_config, stack
from tests.helpers.tiny_answers import AnswerCache, questions
from tests.helpers.tiny_cache import BYTES

PAIRS = [("what", "that"), ("who is it", "she"), ("is it?", "no, it is not"), ("x", "y")]
LENGTH = 40
CONFIG = model_config(vocab_size=BYTES.vocab_size)
PARAMS = make_params(CONFIG)
TASK = objectives.Task(None, BYTES, LENGTH)


@functools.cache
def sums_of(plugin):
    graph = abstract(CONFIG).graph

    def run(params, batch):
        return plugin.loss(nnx.merge(graph, segmented(params, ((0, CONFIG.layers),))), batch, jax.random.key(0), TASK)

    return jit(run)


def measured(*rows: Batch, plugin=instruct) -> dict[str, float]:
    rows = (*rows, *[empty_window(LENGTH)] * (2 - len(rows)))
    found = sums_of(plugin)(PARAMS, jax.tree.map(jnp.asarray, stack(*rows)))
    return {"loss": found.loss, "weight": found.weight, **found.metrics}


def table(pairs, length: int = LENGTH):
    return load_plugin(windows, instruct.WINDOWS["dialogue"]).WindowTable(questions(pairs, BYTES), length)


def rows_of(table) -> list[Batch]:
    return [table[number] for number in range(len(table))]


def test_packed_answers_give_the_sum_of_what_each_gives_alone():
    packed = rows_of(table(PAIRS))
    assert len(packed) == 2 and max(row.segments.max() for row in packed) > 1
    alone = [measured(*rows_of(table([pair]))) for pair in PAIRS]
    together = measured(*packed)
    for name in ("loss", "weight", "accuracy"):
        assert together[name] == pytest.approx(sum(float(each[name]) for each in alone), rel=1e-5)
    assert together["weight"] == sum(len(answer) + 1 for _, answer in PAIRS)


def test_the_loss_is_that_of_a_hand_computation_over_the_answer_and_its_end():
    [row] = rows_of(table(PAIRS[:1]))
    logits = reference.row_logits(CONFIG, PARAMS, reference.row_hidden(CONFIG, PARAMS, row))
    tokens = [BYTES.bos_id, *BYTES.encode("whatthat"), BYTES.eos_id]
    places = range(4, 9)  # each predicts the token behind it
    expected = sum(reference.nats(logits[place], np.array(tokens[place + 1])) for place in places)
    found = measured(row)
    assert found["loss"] == pytest.approx(float(expected), rel=1e-5) and found["weight"] == 5
    assert found["accuracy"] == sum(np.argmax(logits[place]) == tokens[place + 1] for place in places)


def test_the_words_of_a_prompt_are_no_targets_and_yet_are_read():
    [row] = rows_of(table(PAIRS[:1]))
    other = row._replace(targets=np.where(row.weights > 0, row.targets, 9).astype(np.int32))
    assert measured(other)["loss"] == measured(row)["loss"]
    assert measured(*rows_of(table([("whet", "that")])))["loss"] != measured(row)["loss"]


def test_plain_text_is_learnt_whole_beside_answers():
    assert instruct.WINDOWS["text"] == causal.WINDOWS["text"]
    whole = AnswerCache([each._replace(answer_mask=None) for each in questions(PAIRS, BYTES)._documents])
    rows = rows_of(load_plugin(windows, "dialogue").WindowTable(whole, LENGTH))
    found, plain = measured(*rows), measured(*rows, plugin=causal)
    assert found["loss"] == pytest.approx(float(plain["loss"])) and found["weight"] == whole.tokens - len(PAIRS)


def test_a_batch_without_an_answer_contributes_nothing():
    found = measured(empty_window(LENGTH))
    assert {name: float(value) for name, value in found.items()} == {"loss": 0, "weight": 0, "accuracy": 0}

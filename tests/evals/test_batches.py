"""The batches of an evaluation: computed ahead, read by the process that needs them, by programs that models share."""

import jax
import jax.numpy as jnp
import numpy as np

from llm3.config.schema import EvaluationConfig
from llm3.data.mixture import finite_batch
from llm3.data.windows import pieces
from llm3.evals import OwnRows, overlapped, perplexity
from llm3.segments import segmented
from llm3.stages.evaluation import Evaluation
from tests.evals.test_perplexity import Bytes, cache
from tests.helpers.tiny import make_params, model_config
from tests.helpers.tiny_cache import make_context


def test_the_devices_are_given_two_batches_ahead_of_the_one_that_is_read():
    started, ahead = [], []

    def results():
        for number in range(5):
            started.append(number)
            yield number, {"x": jnp.float32(10 * number)}

    for number, arrays in overlapped(results()):
        assert isinstance(arrays["x"], np.ndarray) and arrays["x"] == 10 * number
        ahead.append(len(started) - number - 1)
    assert ahead == [2, 2, 2, 1, 0]


def test_a_process_reads_its_own_rows_and_all_have_the_results_of_all_rows():
    read = []

    class Windows(pieces.WindowTable):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    documents = cache()
    whole, watched = pieces.WindowTable(documents, 16), Windows(documents, 16)
    numbers = iter(range(99))

    def place(local):  # the other rows come from other processes
        number = next(numbers)
        batch = finite_batch(whole, 4, number)
        assert all(np.array_equal(ours, field[[1, 3]]) for ours, field in zip(local, batch, strict=True))
        return jax.tree.map(jnp.asarray, batch)

    alone = make_context(perplexity, documents, tokenizer=Bytes())
    shared = type(alone)(**vars(alone) | {"own": OwnRows([1, 3], place)})
    found, expected = (
        each.by_document(perplexity.sums, jnp.asarray(Bytes.is_text), table=table)["nats"]
        for each, table in ((shared, watched), (alone, whole))
    )
    np.testing.assert_array_equal(found, expected)
    last = len(whole) // 4 * 4  # padding of the last batch has the shape of its first window
    assert {index % 4 for index in read if index < last} == {1, 3}
    assert set(read) >= {index for index in range(len(whole)) if index % 4 in (1, 3)}


def test_a_program_that_reads_no_task_head_serves_the_models_before_and_after_a_task(one_device):
    plain, tuned = (model_config(vocab_size=64, **more) for more in ({}, {"classes": 3, "max_output_positions": 2}))
    params = make_params(tuned)
    config = EvaluationConfig("perplexity", "source", sequence_length=16, batch_size=4)
    evaluation = Evaluation("general", config, perplexity, None, "pieces", cache())
    compiled: dict = {}
    with jax.set_mesh(one_device):
        before, after = (
            evaluation.measure(segmented(each, ((0, 3),)), model, Bytes(), one_device, compiled)
            for each, model in (({k: v for k, v in params.items() if k != "head"}, plain), (params, tuned))
        )
    (program,) = compiled.values()
    assert program._cache_size() == 1 and before["bits_per_byte"] == after["bits_per_byte"]

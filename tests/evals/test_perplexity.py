"""Bits per byte against hand computations over tokens in numpy, however the text is batched, packed or placed."""

import functools
import math

import jax
import numpy as np
import pytest

from llm3 import evals
from llm3.data.packing import empty_window, mark_segment
from llm3.data.windows import pieces
from llm3.distributed.sharding import place_batch, tree_shardings
from llm3.evals import perplexity
from llm3.models.transformer import abstract
from llm3.segments import segmented
from tests.helpers import reference
from tests.helpers.tiny import make_documents, make_params, model_config
from tests.helpers.tiny_cache import COUNTED, MemoryCache, make_context, plain, without_predictions

TAGS = ["north", "south", "never"]


class Bytes:
    """A tokenizer, as far as bits per byte ask for one: tokens of 1 to 4 bytes, and special ones of none."""

    vocab_size = 64
    byte_lengths = np.random.default_rng(3).integers(1, 5, 64).astype(np.int32)
    byte_lengths[:4] = 0
    is_text = byte_lengths > 0


DOCUMENTS = make_documents(16, seed=5)


def cache(documents=tuple(DOCUMENTS), tags=None) -> MemoryCache:
    sized = [plain(*each)._replace(text_bytes=int(Bytes.byte_lengths[each[1:]].sum())) for each in documents]
    return MemoryCache(sized, tags, TAGS if tags is not None else ())


def evaluated(documents=tuple(DOCUMENTS), tags=None, **changes) -> dict:
    return perplexity.evaluate(make_context(perplexity, cache(documents, tags), tokenizer=Bytes(), **changes))


def metrics(*arguments, **changes) -> dict[str, float]:
    return without_predictions(evaluated(*arguments, **changes))


@functools.cache
def totals_by_hand() -> np.ndarray:
    """[documents, 2]: nats and bytes of each."""
    config, found = model_config(vocab_size=64), np.zeros((len(DOCUMENTS), 2))
    params = make_params(config)
    for each, document in zip(found, DOCUMENTS, strict=True):
        row = empty_window(len(document))
        row.tokens[:] = document
        mark_segment(row, slice(0, len(document)), 1)
        logits = reference.row_logits(config, params, reference.row_hidden(config, params, row))
        lengths = Bytes.byte_lengths[document[1:]]
        each[0] = reference.nats(logits[:-1], document[1:])[lengths > 0].sum()
        each[1] = lengths.sum()
    return found


def bits_per_byte_by_hand(chosen=slice(None)) -> float:
    nats, length = totals_by_hand()[chosen].sum(axis=0)
    return nats / (math.log(2) * length)


@pytest.mark.parametrize(("length", "batch_size"), [(8, 4), (16, 4), (24, 1)])
def test_bits_per_byte_is_total_nats_over_total_bytes_however_batched_and_packed(length, batch_size):
    COUNTED.clear()
    found = evaluated(length=length, batch_size=batch_size)
    columns = found.pop("predictions")
    assert {"windows": len(pieces.WindowTable(cache(), length))} == COUNTED
    assert found == {"bits_per_byte": pytest.approx(bits_per_byte_by_hand(), rel=1e-5)}
    assert found["bits_per_byte"] == columns["nats"].sum() / (math.log(2) * columns["bytes"].sum())
    by_row = totals_by_hand()[np.argsort(cache().rows)]
    np.testing.assert_allclose(np.stack([columns["nats"], columns["bytes"]], axis=1), by_row, rtol=1e-5)
    assert columns["item"].tolist() == sorted(cache().rows)


def test_each_tag_that_occurs_has_its_own_bits_per_byte_beside_those_of_all():
    tags = np.arange(16) % 3 == 0
    found = evaluated(tags=tags.astype(int))
    assert found["bits_per_byte"] == pytest.approx(bits_per_byte_by_hand(), rel=1e-5)
    expected = {"north": bits_per_byte_by_hand(~tags), "south": bits_per_byte_by_hand(tags)}
    assert found["by_tag"] == pytest.approx(expected, rel=1e-5)
    named = [TAGS[int(tag)] for tag in tags]
    assert found["predictions"]["tag"] == [named[place] for place in np.argsort(cache().rows)]


def test_a_mean_of_the_metrics_of_documents_would_be_another_one():
    nats, length = totals_by_hand().T
    assert abs(np.mean(nats / length) / math.log(2) / bits_per_byte_by_hand() - 1) > 1e-3


def test_bits_per_byte_is_the_same_on_eight_devices(eight_devices):
    config = model_config(vocab_size=64)
    whole, cut = abstract(config), segmented(make_params(config), ((0, 3),))
    with jax.set_mesh(eight_devices):
        placed = jax.tree.map(jax.device_put, cut, tree_shardings(eight_devices, whole.shapes, whole.axes))
        found = metrics(params=placed, place=functools.partial(place_batch, eight_devices), batch_size=8)
    assert found["bits_per_byte"] == pytest.approx(bits_per_byte_by_hand(), rel=1e-5)


def test_a_uniform_model_needs_log2_of_the_vocabulary_for_each_token():
    params = make_params(model_config(vocab_size=64))
    uniform = segmented({**params, "embed": {"embedding": np.zeros((64, 16), np.float32)}}, ((0, 3),))
    targets = np.concatenate([document[1:] for document in DOCUMENTS])
    expected = math.log2(64) * np.sum(Bytes.byte_lengths[targets] > 0) / Bytes.byte_lengths[targets].sum()
    assert metrics(params=uniform)["bits_per_byte"] == pytest.approx(expected, rel=1e-6)


def test_special_tokens_count_neither_nats_nor_bytes():
    plain_text = np.array([10, 20, 30, 40, 50])
    special = np.array([10, 20, 30, 40, 50, 2])  # its nats would be in the sum
    one, other = (metrics((each,)) for each in (plain_text, special))
    assert one == {"bits_per_byte": pytest.approx(other["bits_per_byte"], rel=1e-6)}


def test_sums_are_added_in_float64():
    class Given(evals.EvalContext):
        def each(self, function, *arrays, table=None, change=None):
            for value in (2.0**24, 1.0, 1.0, 1.0):  # in float32, 2^24 + 1 is 2^24
                yield None, {"nats": np.float32(value)}

    test = make_context(perplexity, cache(), tokenizer=Bytes())
    given = Given(**{name: getattr(test, name) for name in evals.EvalContext.__dataclass_fields__})
    assert given.sums(None)["nats"] == 2**24 + 3

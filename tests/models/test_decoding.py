"""Decoding in batches: each answer is that of its prompt alone, read anew for each token; the cache stays in place."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm3.models.batching import Request, Shape, local_decoder, without_stop
from llm3.models.decoding import GREEDY, Sampling, next_token
from tests.helpers import reference
from tests.helpers.tiny import VOCAB, make_documents, make_params, make_row, model_config, stack

WINDOWS = {"layers": 4, "window": 3, "full_attention_layers": (1, 3), "attention_softcap": 1.5, "qk_norm": "head"}
LEARNED = {"layers": 4, "positions": "learned", "max_positions": 64}
CASES = {
    "alternating windows, all layers scanned, greedy": (WINDOWS, ((0, 4),), GREEDY),
    "learned positions, segments, drawn": (LEARNED, ((0, 1), (1, 4)), Sampling(0.9, top_k=30)),
}
LONGEST = 40
READS, WRITES = ("parameter", "get-tuple-element", "bitcast"), ("scatter", "dynamic-update-slice")  # in place


def recomputed(config, params, request: Request, sampling: Sampling) -> list[int]:
    """The whole text through the numpy model for each token."""
    text, made = list(request.prompt), []
    while len(made) < request.limit:
        read = stack(make_row(np.array(text, np.int32), length=LONGEST))
        logits = jnp.asarray(reference.logits(config, params, read)[:1, len(text) - 1], jnp.float32)
        key = jax.random.fold_in(jax.random.key(request.seed), len(made))
        text.append(int(next_token(logits, key, **sampling._asdict())[0]))
        made.append(text[-1])
        if (kept := without_stop(made, request.stops)) != made:
            return kept
    return made


@pytest.mark.parametrize("case", CASES)
def test_answers_are_those_of_recomputation_whatever_the_batch_and_its_order(case):
    changes, segments, sampling = CASES[case]
    config = model_config(**changes)
    params = make_params(config)
    prompts = [each.tolist() for each in make_documents(6, least=1, most=9)]
    requests = [Request(prompt, 5 + 3 * seed, [], seed) for seed, prompt in enumerate(prompts)]
    first = recomputed(config, params, requests[5], sampling)
    requests[5] = requests[5]._replace(stops=[[VOCAB], first[3:5]])
    expected = [recomputed(config, params, each, sampling) for each in requests]
    assert len({tuple(each) for each in expected}) == 6 and len(expected[5]) < len(first)
    shape = Shape(rows=2, width=12, max_tokens=20, stops=(2, 2))
    decoder = local_decoder(jax.tree.map(jnp.asarray, params), config, shape, sampling, segments=segments)
    for order in (range(6), (3, 5), (5, 2, 4)):
        found = dict(decoder.answers(enumerate(requests[number] for number in order)))
        assert [found[place] for place in range(len(order))] == [expected[number] for number in order]


def test_an_answer_that_the_caller_ends_makes_room_for_the_next():
    config = model_config()
    params = jax.tree.map(jnp.asarray, make_params(config))
    decoder, requests = local_decoder(params, config, Shape(1, 8, 12), steps=4), [Request([7, 3], 12), Request([9], 12)]
    whole = dict(decoder.answers(enumerate(requests)))
    found = dict(decoder.answers(enumerate(requests), lambda number, tokens: number == 0 and len(tokens) > 4))
    assert found == {0: whole[0][: len(found[0])], 1: whole[1]} and 4 < len(found[0]) < 12


@pytest.mark.parametrize("segments", [((0, 1), (1, 2)), ((0, 2),)], ids=["a layer each", "scanned"])
def test_the_compiled_loop_copies_no_cache(segments):
    config, rows, slots = model_config(layers=2), 3, 2048
    shape = Shape(rows, width=slots - 32, max_tokens=32)
    decoder = local_decoder(make_params(config), config, shape, segments=segments)
    state, going = decoder._rows, np.ones(rows, bool)
    compiled = decoder._advance.func.lower(*decoder._advance.args, state, going, np.int32(0)).compile()
    buffers, memory = jax.tree.leaves(state.cache.buffers), compiled.memory_analysis()
    large = buffers[0].size  # of all layers that share a buffer
    instructions = compiled.as_text().split("\nENTRY ")[0]
    writes = 0
    for dims, kind, rest in re.findall(r" = \w+\[([\d,]+)\]\S* ([\w\-]+)\(([^\n]*)", instructions):
        if np.prod([int(each) for each in dims.split(",")]) >= large:
            if kind == "fusion":
                called = re.escape(re.search(r"calls=(%?[\w.\-]+)", rest)[1])
                kind = re.search(rf"^{called} .*?ROOT \S+ = \S+ ([\w\-]+)", instructions, re.M | re.S)[1]
            assert kind in (*READS, *WRITES), (kind, dims)
            writes += kind in WRITES
    assert writes >= len(buffers)
    assert memory.alias_size_in_bytes >= sum(each.nbytes for each in buffers)
    slices = 0 if len(segments) == 2 else 2 * buffers[0].nbytes // 2  # what the loop over layers reads of both buffers
    assert memory.temp_size_in_bytes < slices + buffers[0].nbytes

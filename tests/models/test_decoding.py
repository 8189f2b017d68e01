"""Decoding in batches: each answer is that of its prompt alone, read anew for each token; the cache stays in place."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm3.config.model_schema import AdapterConfig
from llm3.config.sampling import GREEDY, Sampling
from llm3.models.batching import Request, Shape, local_decoder, without_stop
from llm3.models.decoding import Kept, advance
from llm3.models.sampling import Needs, next_token, penalised
from tests.helpers import reference
from tests.helpers.tiny import VOCAB, make_documents, make_params, make_row, model_config, stack

WINDOWS = {"layers": 4, "window": 3, "full_attention_layers": (1, 3), "attention_softcap": 1.5, "qk_norm": "head"}
LEARNED = {"layers": 4, "positions": "learned", "max_positions": 64}
CASES = {
    "alternating windows, all layers scanned": (WINDOWS, ((0, 4),)),
    "learned positions, segments": (LEARNED, ((0, 1), (1, 4))),
}
SETTINGS = [GREEDY, Sampling(0.9, top_k=30), Sampling(1.2, min_p=0.05), Sampling(repetition_penalty=1.5)]
LONGEST = 40
READS, WRITES = ("parameter", "get-tuple-element", "bitcast"), ("scatter", "dynamic-update-slice")  # in place


def recomputed(config, params, request: Request) -> tuple[list[int], np.ndarray]:
    """The tokens, and their log probabilities, from the whole text through the numpy model for each token."""
    text, made, logprobs = list(request.prompt), [], []
    while len(made) < request.limit:
        read = stack(make_row(np.array(text, np.int32), length=LONGEST))
        logits = jnp.asarray(reference.logits(config, params, read)[0, len(text) - 1], jnp.float32)
        key = jax.random.fold_in(jax.random.key(request.seed), len(made))
        seen = jnp.isin(jnp.arange(len(logits)), jnp.array(text))
        text.append(int(next_token(penalised(logits, seen, request.sampling), key, request.sampling)))
        made.append(text[-1])
        logprobs.append(np.log(np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()))
        if (kept := without_stop(made, request.stops)) != made:
            return kept, np.array(logprobs)
    return made, np.array(logprobs)


@pytest.mark.parametrize("case", CASES)
def test_answers_are_those_of_recomputation_whatever_the_batch_and_its_order(case):
    changes, segments = CASES[case]
    config = model_config(**changes)
    params = make_params(config)
    prompts = [each.tolist() for each in make_documents(6, least=1, most=9)]
    requests = [
        Request(prompt, 4 + 2 * seed, [], seed, SETTINGS[seed % len(SETTINGS)]) for seed, prompt in enumerate(prompts)
    ]
    first, _ = recomputed(config, params, requests[5])
    requests[5] = requests[5]._replace(stops=[[VOCAB], first[3:5]])
    expected = [recomputed(config, params, each) for each in requests]
    answers = [tokens for tokens, _ in expected]
    assert len({tuple(each) for each in answers}) == 6 and len(answers[5]) < len(first)
    shape = Shape(rows=2, width=12, max_tokens=20, stops=(2, 2), alternatives=3, penalties=True)
    decoder = local_decoder(jax.tree.map(jnp.asarray, params), config, shape, segments=segments)
    for order in (range(6), (3, 5), (5, 2, 4)):
        found = dict(decoder.answers(enumerate(requests[number] for number in order)))
        assert [found[place] for place in range(len(order))] == [answers[number] for number in order]
    for number in (0, 5):
        decoder.admit([(number, requests[number])])
    for progress in decoder.advance():
        tokens, logprobs = expected[progress.number]
        assert progress.complete and progress.tokens == tokens and bool(progress.stop) == (progress.number == 5)
        highest = np.sort(logprobs)[:, :-4:-1]
        np.testing.assert_allclose(progress.scores.their_logprobs, highest, atol=2e-4)
        np.testing.assert_allclose(np.take_along_axis(logprobs, progress.scores.likeliest, 1), highest, atol=2e-4)
        scored = tokens + progress.stop
        np.testing.assert_allclose(progress.scores.logprobs, logprobs[range(len(scored)), scored], atol=2e-4)


def test_variants_with_their_own_adapters_share_a_batch():
    adapters = [("law", AdapterConfig(rank=2)), ("medicine", AdapterConfig(rank=3, targets=("query", "down")))]
    config = model_config(layers=3, adapters=tuple(adapters))
    params, cut = make_params(config), ((0, 1), (1, 3))
    variants: list[tuple[str, ...]] = [(), ("law",), ("medicine",), ("law", "medicine")]
    prompt, shape = [7, 3, 1], Shape(rows=4, width=8, max_tokens=12)
    decoder = local_decoder(params, config, shape._replace(variants=tuple(variants)), segments=cut)
    requests = [Request(prompt, 12, variant=number) for number in range(4)]
    found = dict(decoder.answers(enumerate(requests)))
    for number, active in [*enumerate(variants)][1::2]:
        own = [(name, dataclasses.replace(each, active=name in active)) for name, each in adapters]
        alone = local_decoder(params, model_config(layers=3, adapters=tuple(own)), shape, segments=cut)
        assert found[number] == dict(alone.answers([(0, requests[number]._replace(variant=0))]))[0]
    assert len({tuple(each) for each in found.values()}) == 4


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
    loop = decoder.jit(partial(advance, needs=Needs(), kept=Kept(32)))
    compiled = loop.func.lower(*loop.args, state, going, np.int32(0), np.int32(32)).compile()
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

"""With blocks of the vocabulary, no evaluation of the LM head ever holds the logits of all tokens."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from llm3.evals import choice, masked, perplexity, pseudo_perplexity
from llm3.models.transformer import abstract
from tests.helpers.tiny import LENGTH, VOCAB, make_batch, model_config
from tests.helpers.tiny_jaxpr import largest_with_axis

ROWS, BLOCK, CHOICES, SEGMENTS = 4, 20, 3, 4  # no other axis has 20
BATCH, TEXT = make_batch(ROWS), np.ones(VOCAB, bool)
TAILS = [np.zeros((ROWS, CHOICES * LENGTH), dtype) for dtype in (np.int32, np.int32, np.float32)]
PROMPTS = np.zeros((ROWS, LENGTH), np.int32), np.full(ROWS, LENGTH, np.int32)
FUNCTIONS = {
    "choice": lambda model: choice.nats(model, *PROMPTS, *TAILS, choices=CHOICES),
    "masked": lambda model: masked.sums(model, BATCH, segments=SEGMENTS),
    "perplexity": lambda model: perplexity.sums(model, BATCH, TEXT, segments=SEGMENTS),
    "pseudo_perplexity": lambda model: pseudo_perplexity.sums(model, BATCH, TEXT, mask_id=3, segments=SEGMENTS),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_logits_are_held_for_a_block_of_the_vocabulary_at_a_time(name):
    config = model_config(vocab_block=BLOCK, causal=name in ("choice", "perplexity"), pool="mean")
    model = abstract(config)
    program = jax.make_jaxpr(functools.partial(_run, model.graph, FUNCTIONS[name]))(model.shapes)
    assert largest_with_axis(program.jaxpr, VOCAB) == 0
    assert largest_with_axis(program.jaxpr, BLOCK) >= ROWS * BLOCK  # of a block


def _run(graph, function, params):
    return function(nnx.merge(graph, params))

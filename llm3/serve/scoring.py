"""The log probabilities of the tokens of a text by a causal stage, with the likeliest tokens in their places."""

from collections.abc import Callable, Sequence
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llm3.config.model_schema import ModelConfig
from llm3.models.batching import padded_width
from llm3.models.decoding import Scores
from llm3.models.transformer import abstract
from llm3.segments import Segments
from llm3.serve.stages import Served

ALTERNATIVES = 20
PIECE = 128  # places whose logits [PIECE, V] are in memory at once


def score(stage: Served, tokens: Sequence[int]) -> Scores:
    """The scores of all tokens after the first, each after those before it; numpy arrays without an axis of rows.

    Called in the engine's thread. One compiled function for each `padded_width`.
    """
    count = len(tokens) - 1
    width = padded_width(count)
    inputs, targets = np.zeros((2, width), np.int32)
    inputs[:count], targets[:count] = tokens[:-1], tokens[1:]
    found = _compiled(stage.model, stage.shared.segments)(stage.leaves, inputs, targets, np.int32(count))
    return Scores(*(each[:count] for each in jax.device_get(found)))


@cache
def _compiled(config: ModelConfig, segments: Segments) -> Callable:
    graph = abstract(config, segments).graph

    @jax.jit
    def scored(params: dict, inputs: jax.Array, targets: jax.Array, count: jax.Array) -> Scores:
        model = nnx.merge(graph, params)
        places = jnp.arange(len(inputs), dtype=jnp.int32)
        real = places < count
        # padding has position 0: learned positions may end before the padded width
        hidden = model(inputs[None], jnp.where(real, places, 0)[None], real.astype(jnp.int32)[None])[0]

        def piece(part: tuple[jax.Array, jax.Array]) -> Scores:
            states, wanted = part
            logprobs = jax.nn.log_softmax(model.logits(states[None])[0])
            own = jnp.take_along_axis(logprobs, wanted[:, None], axis=1)[:, 0]
            highest, likeliest = jax.lax.top_k(logprobs, min(ALTERNATIVES, config.vocab_size))
            return Scores(own, likeliest, highest)

        size = min(PIECE, len(inputs))
        parts = hidden.reshape(-1, size, hidden.shape[-1]), targets.reshape(-1, size)
        return jax.tree.map(lambda each: each.reshape(-1, *each.shape[2:]), jax.lax.map(piece, parts))

    return scored

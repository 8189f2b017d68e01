"""`bench --decode`: the time of the decoding loop, compared with reading the whole text anew for each token."""

import statistics
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llm3.config.model_schema import ModelConfig, check_length
from llm3.distributed.sharding import place_batch
from llm3.errors import UserError
from llm3.models.batching import Request, Shape, local_decoder
from llm3.models.transformer import abstract, init
from llm3.segments import segmented
from llm3.stages.session import Session
from llm3.stages.stage import Stage

ROWS, PROMPT, LENGTH = 8, 32, 256
STEP = 64  # lengths to which the recomputed text is padded
ROUNDS = 5


def measure_decoding(session: Session, stage: Stage) -> dict:
    """The times are medians over rounds, in turns, of the answers of a batch: `PROMPT` tokens up to `LENGTH`.

    Without a cache, the text is padded to the next multiple of `STEP`, and logits are computed at its last token only.
    Raises UserError for a bidirectional model.
    """
    model = session.phases(stage)[0].model
    if not model.causal:
        raise UserError(f"--decode: {stage.where} is a bidirectional model: expected a causal one")
    check_length(model, LENGTH, "--decode: length")
    params = init(model, session.experiment.init_seed, session.mesh)
    decoder = local_decoder(params, model, Shape(ROWS, PROMPT, LENGTH - PROMPT))
    decoder.place = partial(place_batch, session.mesh)
    text = np.random.default_rng(0).integers(0, model.vocab_size, (ROWS, LENGTH), dtype=np.int32)
    requests = [Request(row[:PROMPT].tolist(), LENGTH - PROMPT) for row in text]
    next_tokens = partial(_recomputation(model), segmented(params, ((0, model.layers),)))

    def decode() -> None:
        list(decoder.answers(enumerate(requests)))

    def recompute() -> float:
        """The seconds for all tokens, from one forward pass of each padded length."""
        total = 0.0
        for length in range(STEP, LENGTH + 1, STEP):
            once = seconds(partial(next_tokens, place_batch(session.mesh, text[:, :length])))
            total += once * (length - max(PROMPT, length - STEP))
        return total

    decode()  # compiles, as the next line does
    recompute()
    found = [(seconds(decode), recompute()) for _ in range(ROUNDS)]
    cached, anew = (statistics.median(each) for each in zip(*found, strict=True))
    tokens = ROWS * (LENGTH - PROMPT)
    return {
        "stage": stage.name,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "batch_size": ROWS,
        "sequence_length": LENGTH,
        "decoding_seconds": cached,
        "recomputation_seconds": anew,
        "decoding_tokens_per_second": tokens / cached,
        "recomputation_tokens_per_second": tokens / anew,
        "speedup": anew / cached,
    }


def seconds(function: Callable[[], object]) -> float:
    """The wall time of a call, until its result is ready."""
    before = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - before


def _recomputation(config: ModelConfig) -> Callable[[dict, jax.Array], jax.Array]:
    """(params, tokens [B, T]) -> the likeliest next token of each row, int32 [B]."""
    graph = abstract(config).graph

    @jax.jit
    def next_tokens(params: dict, tokens: jax.Array) -> jax.Array:
        model = nnx.merge(graph, params)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        hidden = model(tokens, positions, jnp.ones_like(tokens))
        return jnp.argmax(model.logits(hidden[:, -1:]), axis=-1)[:, 0]

    return next_tokens

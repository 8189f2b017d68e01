"""`bench --decode`: the time of the decoding loop, compared with reading the whole text anew for each token."""

import statistics
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llm3.config.model_schema import ModelConfig, check_length
from llm3.distributed.sharding import axis_size, place_batch
from llm3.errors import UserError
from llm3.models.batching import Request, Shape, local_decoder
from llm3.models.transformer import abstract, init
from llm3.segments import segmented
from llm3.stages.session import Session
from llm3.stages.stage import Stage

ROWS, PROMPT, LENGTH = 8, 32, 256  # answers that are also recomputed, tokens of a prompt, and with its answer
STEP = 64  # lengths to which the recomputed text is padded
ROUNDS = 3


class Load(NamedTuple):
    """Answers of these numbers of tokens, so many rows at a time."""

    rows: int
    limits: tuple[int, ...]


# batches of full length, and 32 answers of all lengths in a random order, which take the rows of those that end
LOADS = {f"batch_{size}": Load(size, (LENGTH - PROMPT,) * size) for size in (1, ROWS, 32)}
LOADS["mixed"] = Load(ROWS, tuple(np.random.default_rng(0).permutation(range(7, LENGTH - PROMPT + 1, 7)).tolist()))


def measure_decoding(session: Session, stage: Stage, peers: list[str]) -> dict:
    """The times are medians over rounds, in turns, of all answers of a load, to prompts of `PROMPT` tokens.

    Without a cache, the text is padded to the next multiple of `STEP`, and logits are computed at its last token only.
    peers: the libraries that answer the same prompts, also in turns. Raises UserError for a bidirectional model.
    """
    phase = session.phases(stage)[0]
    model = phase.model
    if not model.causal:
        raise UserError(f"--decode: {stage.where} is a bidirectional model: expected a causal one")
    check_length(model, LENGTH, "--decode: length")
    longest = max(len(load.limits) for load in LOADS.values())
    text = np.random.default_rng(0).integers(0, model.vocab_size, (longest, LENGTH), dtype=np.int32)
    params = init(model, session.experiment.init_seed, session.mesh)
    calls: dict[tuple[str, str], Callable[[], float]] = {
        ("own", name): partial(seconds, _decoding(session, params, model, text, load)) for name, load in LOADS.items()
    }
    calls["recomputation", "batch_8"] = partial(_recomputed, session, params, model, text[:ROWS])
    for peer in peers:
        from llm3.cli.bench.torch_decoding import TorchDecoding  # needs torch

        other = TorchDecoding(stage, phase)
        calls |= {
            (peer, name): partial(seconds, other.answering(text[:, :PROMPT], load.limits, load.rows))
            for name, load in LOADS.items()
        }
    for call in calls.values():
        call()  # compiles
    found = [{key: call() for key, call in calls.items()} for _ in range(ROUNDS)]
    times = {key: statistics.median(each[key] for each in found) for key in calls}
    rates = {name: sum(load.limits) / times["own", name] for name, load in LOADS.items()}
    recomputation = times["recomputation", "batch_8"]
    result = {
        "stage": stage.name,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "batch_size": ROWS,
        "sequence_length": LENGTH,
        "decoding_seconds": times["own", "batch_8"],
        "recomputation_seconds": recomputation,
        "recomputation_tokens_per_second": sum(LOADS["batch_8"].limits) / recomputation,
        "speedup": recomputation / times["own", "batch_8"],
        **{f"{name}_tokens_per_second": rate for name, rate in rates.items()},
        **{f"{name}_speedup": rate / rates["batch_1"] for name, rate in rates.items() if name != "batch_1"},
    }
    if peers:
        result["peers"] = {
            f"{peer}, {name.replace('_', ' ')}": _compared(
                [(each[peer, name], each["own", name]) for each in found], other.about
            )
            for peer in peers
            for name in LOADS
        }
    return result


def _compared(pairs: list[tuple[float, float]], about: str) -> dict[str, Any]:
    """pairs: (seconds of a peer, own seconds) of each round."""
    ratios = [theirs / own for theirs, own in pairs]
    return {
        "of": "for the answers",
        "step_seconds": statistics.median(theirs for theirs, _ in pairs),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "pairs": len(pairs),
        "about": about,
    }


def _decoding(session: Session, params: dict, model: ModelConfig, text: np.ndarray, load: Load) -> Callable[[], object]:
    """A function that answers the first `PROMPT` tokens of the rows of a text, int32 [B, T]."""
    decoder = local_decoder(params, model, Shape(load.rows, PROMPT, LENGTH - PROMPT))
    if load.rows % axis_size(session.mesh, "batch") == 0:
        decoder.place = partial(place_batch, session.mesh)
    prompts = text[:, :PROMPT].tolist()
    requests = [Request(prompt, limit) for prompt, limit in zip(prompts, load.limits, strict=False)]
    return lambda: list(decoder.answers(enumerate(requests)))


def _recomputed(session: Session, params: dict, model: ModelConfig, text: np.ndarray) -> float:
    """The seconds for all tokens, from one forward pass of each padded length."""
    next_tokens, total = partial(_recomputation(model), segmented(params, ((0, model.layers),))), 0.0
    for length in range(STEP, LENGTH + 1, STEP):
        once = seconds(partial(next_tokens, place_batch(session.mesh, text[:, :length])))
        total += once * (length - max(PROMPT, length - STEP))
    return total


def seconds(function: Callable[[], object]) -> float:
    """The wall time of a call, until its result is ready."""
    before = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - before


@cache
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

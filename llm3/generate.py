"""The verb `generate`: sampling with a key-value cache."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Console

from llm3.checkpoint import Checkpoints
from llm3.config import ModelConfig, RunConfig
from llm3.data.tokenizer import Tokenizer
from llm3.errors import UserError, nearest
from llm3.handoff import CHECKPOINTS, trained_stages
from llm3.models.transformer import abstract, make_cache, segmented
from llm3.workdir import TOKENIZER, check_record


def next_token(
    logits: jax.Array, key: jax.Array, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> jax.Array:
    """A token for each row of logits: float32 [B, V] to int32 [B].

    temperature 0 takes the most likely one. top_k > 0 keeps the k most likely (Fan et al. 2018); top_p < 1 keeps the
    smallest set of the most likely ones whose probability reaches p (nucleus sampling, Holtzman et al. 2020).
    """
    if temperature == 0:
        return jnp.argmax(logits, axis=-1)
    logits = logits / temperature
    if top_k:
        kth = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(ordered), axis=-1) - jax.nn.softmax(ordered)
        least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits)


@cache
def make_advance(config: ModelConfig, temperature: float, top_k: int, top_p: float) -> Callable:
    """A jitted advance(params, cache, tokens [B, T], key) -> (cache, the next token [B]); the cache is donated."""
    graph = abstract(config).graph

    @partial(jax.jit, donate_argnums=1)
    def advance(params: dict, cache: dict, tokens: jax.Array, key: jax.Array) -> tuple[dict, jax.Array]:
        positions = cache["index"] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        model = nnx.merge(graph, params)
        hidden, cache = model(tokens, positions, jnp.ones_like(tokens), cache)
        logits = model.logits(hidden[:, -1:])[:, 0]
        return cache, next_token(logits, key, temperature=temperature, top_k=top_k, top_p=top_p)

    return advance


def sample(
    params: dict,
    config: ModelConfig,
    prompt: list[int],
    *,
    max_tokens: int,
    seed: int = 0,
    stop: int | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> list[int]:
    """Up to `max_tokens` tokens after the prompt, the `stop` token not included. params: canonical."""
    advance = make_advance(config, temperature, top_k, top_p)
    params = segmented(params, ((0, config.layers),))
    # leaves of a new cache may share a buffer, and a buffer can be donated only once
    kv = jax.tree.map(jnp.copy, make_cache(config, 1, len(prompt) + max_tokens))
    tokens, keys, result = jnp.array([prompt], jnp.int32), jax.random.key(seed), []
    for i in range(max_tokens):
        kv, token = advance(params, kv, tokens, jax.random.fold_in(keys, i))
        if int(token[0]) == stop:
            break
        result.append(int(token[0]))
        tokens = token[:, None].astype(jnp.int32)
    return result


def load_stage(workdir: Path, name: str, step: str = "latest") -> tuple[dict, ModelConfig, dict]:
    """The canonical parameters of a stage of a run as numpy arrays, its model and its metadata. Raises UserError."""
    found = [each.parent.name for each in workdir.glob(f"*/{CHECKPOINTS}")]
    if name not in found:
        raise UserError(f"{workdir} holds no stage {name!r}; {nearest(name, found)}")
    checkpoints = Checkpoints(workdir / name / CHECKPOINTS, read_only=True)
    if (latest := checkpoints.latest()) is None:
        raise UserError(f"{workdir / name} has no complete checkpoint yet")
    if step != "latest" and not step.isdecimal():
        raise UserError(f"--step={step}: expected a step number or 'latest'")
    number = latest if step == "latest" else int(step)
    meta = checkpoints.meta(number)
    return checkpoints.load_params(number), ModelConfig(**meta["model"]), meta | {"step": number}


def generate(config: RunConfig | None, workdir: Path, stage: str | None, prompt: str, **options) -> int:
    """Print what a stage (default: every stage of the run, one under another) makes of a prompt.

    The run tells all; a config that is given must be the run's. Raises UserError.
    """
    for option, least in (("max_tokens", 1), ("temperature", 0), ("top_k", 0)):
        if options[option] < least:
            raise UserError(f"--{option}={options[option]}: expected at least {least}")
    if not 0 < options["top_p"] <= 1:
        raise UserError(f"--top_p={options['top_p']}: expected a probability above 0, at most 1")
    console = Console(highlight=False)
    names = [stage] if stage else trained_stages(workdir)
    for name in names if config else ():
        check_record(workdir, config, name)
    tokenizer = Tokenizer.load(workdir / TOKENIZER)
    tokens = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    for name in names:
        params, model, _ = load_stage(workdir, name)
        if not model.causal:
            raise UserError(f"{workdir / name} is a bidirectional model: it predicts hidden tokens, not the next one")
        if not stage:
            console.rule(name, align="left")
        made = sample(jax.tree.map(jnp.asarray, params), model, tokens, stop=tokenizer.eos_id, **options)
        print(prompt + tokenizer.decode(made), flush=True)
    return 0

"""The verb `generate`: sample continuations of a prompt from the stages of a run."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from llm3.checkpoints.load import load_stage, trained_stages
from llm3.cli.checks import check_sampling
from llm3.config.schema import RunConfig
from llm3.data.tokenizer import Tokenizer
from llm3.errors import UserError
from llm3.files import TOKENIZER
from llm3.models.decoding import sample
from llm3.stages.workdir import check_record


def generate(
    workdir: Path, prompt: str, stage: str | None = None, config: RunConfig | None = None, **options: Any
) -> int:
    """Print a continuation of the prompt from one stage (default: from each stage of the run).

    The run holds all that is needed; a given config must match it. options: the sampling options of `sample`. Raises
    UserError.
    """
    check_sampling(options)
    console = Console(highlight=False)
    names = [stage] if stage else trained_stages(workdir)
    if config:
        for name in names:
            check_record(workdir, config, name)
    tokenizer = Tokenizer.load(workdir / TOKENIZER)
    tokens = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    for name in names:
        params, model, _ = load_stage(workdir, name)
        if not model.causal:
            raise UserError(f"{workdir / name} is a bidirectional model: it predicts hidden tokens, not the next one")
        if not stage:
            console.rule(name, align="left")
        continuation = sample(jax.tree.map(jnp.asarray, params), model, tokens, stop=tokenizer.eos_id, **options)
        print(prompt + tokenizer.decode(continuation), flush=True)
    return 0

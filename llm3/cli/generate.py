"""The verb `generate`: what the stages of a run make of a prompt."""

from pathlib import Path

import jax
import jax.numpy as jnp
from rich.console import Console

from llm3.checkpoints.load import load_stage, trained_stages
from llm3.config.schema import RunConfig
from llm3.data.tokenizer import Tokenizer
from llm3.errors import UserError
from llm3.files import TOKENIZER
from llm3.models.decoding import sample
from llm3.stages.workdir import check_record


def generate(workdir: Path, prompt: str, stage: str | None = None, config: RunConfig | None = None, **options) -> int:
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

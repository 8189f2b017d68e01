"""The verb `generate`: what the stages of a run make of a prompt."""

from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console

from llm3.checkpoints.stage_checkpoints import Checkpoints
from llm3.config.schema import ModelConfig, RunConfig
from llm3.data.tokenizer import Tokenizer
from llm3.errors import UserError, nearest
from llm3.handoff.parent import CHECKPOINTS, trained_stages
from llm3.models.decoding import sample
from llm3.stages.workdir import TOKENIZER, check_record
from llm3.training.phase import abstract_params


def load_stage(
    workdir: Path, name: str, step: str = "latest", mesh: Mesh | None = None
) -> tuple[dict, ModelConfig, dict]:
    """The canonical parameters of a stage of a run, its model and its metadata. Raises UserError.

    mesh: where the parameters are placed; None: numpy arrays.
    """
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
    model = ModelConfig(**meta["model"])
    params = checkpoints.load_params(number, None if mesh is None else abstract_params(model, mesh))
    return params, model, meta | {"step": number}


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

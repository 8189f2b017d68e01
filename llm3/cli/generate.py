"""The verb `generate`: sample continuations of a prompt from the stages of a run."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from llm3.checkpoints.load import load_stage, load_tokenizer, trained_stages
from llm3.cli.checks import check_sampling
from llm3.config.schema import RunConfig
from llm3.data.chat_templates import trained_template
from llm3.data.prompts import read_prompt
from llm3.errors import UserError
from llm3.models.batching import timed_sample
from llm3.report.console import new_console
from llm3.report.units import count
from llm3.stages.workdir import check_record


def generate(
    workdir: Path,
    prompt: str,
    stage: str | None = None,
    config: RunConfig | None = None,
    raw: bool = False,
    **options: Any,
) -> int:
    """Print a continuation of the prompt from one stage (default: from each stage of the run).

    A stage that was trained with a chat template takes the prompt for the user's turn and answers it, up to the end of
    its own turn. It only continues a prompt that is written with the template already, or with `raw`.

    The run holds all that is needed; a given config must match it. options: the sampling options of `timed_sample`.
    Raises UserError.
    """
    check_sampling(options)
    console = new_console()
    names = [stage] if stage else trained_stages(workdir)
    if config:
        for name in names:
            check_record(workdir, config, name)
    for name in names:
        params, model, meta = load_stage(workdir, name)
        tokenizer = load_tokenizer(workdir, name, meta)
        if not model.causal:
            raise UserError(f"{workdir / name} is a bidirectional model: it predicts hidden tokens, not the next one")
        template = trained_template(workdir, name, meta.get("chat_template"))
        if not stage:
            console.rule(name, align="left")
        read = read_prompt(prompt, template, tokenizer, raw)
        stops = [*([end] for end in tokenizer.end_ids), read.end]
        found, rate = timed_sample(jax.tree.map(jnp.asarray, params), model, read.tokens, stops=stops, **options)
        text = read.text(found, tokenizer)
        print(text if read.answers else prompt + text, flush=True)
        new_console(stderr=True).print(f"{len(found)} tokens, {count(rate)} tokens/s", style="dim")
    return 0

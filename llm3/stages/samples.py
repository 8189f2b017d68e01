"""Samples: a config's prompts, continued greedily by each model of a run, and kept beside its metrics.

A causal model continues a prompt. A bidirectional model proposes tokens for each mask token of a prompt, and skips a
prompt without one. The order of the prompts, the mesh and the number of processes change no sample.
"""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from llm3.config.schema import EvaluationConfig
from llm3.data.prompts import Prompt, read_prompt, with_masks
from llm3.distributed import interrupts, memory, processes
from llm3.distributed.sharding import axis_size, place_batch
from llm3.errors import UserError, writing
from llm3.evals import EvalContext
from llm3.evals.generation import generate_tokens
from llm3.files import SAMPLES, write_atomic
from llm3.models.batching import Request
from llm3.models.heads import without_task_head
from llm3.models.transformer import Transformer
from llm3.report.console import shortened
from llm3.report.logs import MetricsWriter
from llm3.report.units import percent
from llm3.segments import segmented
from llm3.stages.evaluation import Subject
from llm3.stages.session import Session

PROPOSALS = 3  # for each mask token
SHOWN_CHARACTERS = 200  # of a line on the console


def take_samples(
    session: Session, subject: Subject, params: dict, step: int, template: str = "", writer: MetricsWriter | None = None
) -> None:
    """Continue the config's prompts with canonical parameters; print the samples, and keep them.

    All processes call it; the first one writes. template: the chat template that the model was trained with. writer:
    also shows them. Raises NotWritten if the disk refuses.
    """
    prompts, tokens = session.config.samples, session.config.sample_tokens
    if not prompts or not subject.lm_head:
        return
    fields = ["config.sample_tokens", "config.samples (fewer prompts)"]
    with interrupts.doing(f"sampling from {subject.name}"), memory.explained("config.samples", fields):
        context = _context(session, subject, params)
        if subject.model.causal:
            read = [read_prompt(each, template, context.tokenizer) for each in prompts]
            texts = continued(context, read, tokens)
        else:
            texts = filled_in(context, [with_masks(each, context.tokenizer) for each in prompts])
    if not processes.is_first():
        return
    pairs = list(zip(prompts, texts, strict=True))
    keep_samples(session.workdir / subject.name, step, pairs)
    for prompt, text in pairs:
        line = f"{subject.name}: step {step}: {_on_one_line(prompt)} | {_on_one_line(text)}"
        session.console.print(shortened(line, SHOWN_CHARACTERS))
    if writer is not None:
        writer.samples(step, pairs)


def _on_one_line(text: str) -> str:
    """The text for a terminal, which would obey control characters."""
    return "".join(each if each.isprintable() else "\ufffd" for each in " ".join(text.split())) or "(blank)"


def _context(session: Session, subject: Subject, params: dict) -> EvalContext:
    """The model as evaluations have it, with room for all prompts in a batch that the mesh divides."""
    pieces = axis_size(session.mesh, "batch")
    rows = -(-len(session.config.samples) // pieces) * pieces
    params, model = without_task_head(segmented(params, ((0, subject.model.layers),)), subject.model)
    return EvalContext(
        params=params,
        model=model,
        config=EvaluationConfig(kind="generation", batch_size=rows),
        options=None,
        kind="",
        cache=None,  # type: ignore[arg-type]  # prompts are not documents
        tokenizer=session.experiment.tokenizer,
        place=partial(place_batch, session.mesh),
        compiled=session.compiled_evaluations,
    )


def continued(context: EvalContext, prompts: list[Prompt], max_tokens: int) -> list[str]:
    """The most likely continuation, or answer, of each prompt."""
    width = max(len(each.tokens) for each in prompts)
    ends = [[end] for end in context.tokenizer.end_ids]
    made = generate_tokens(context, [Request(each.tokens, max_tokens, [*ends, each.end]) for each in prompts], width)
    return [prompt.text(tokens, context.tokenizer) for prompt, tokens in zip(prompts, made, strict=True)]


def proposals(model: Transformer, tokens: jax.Array, segments: jax.Array) -> dict[str, jax.Array]:
    """The likeliest tokens at each position, int32 [B, T, k], and their probabilities, float32 [B, T, k]."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    hidden = model(tokens, positions, segments)
    likely, chosen = jax.lax.top_k(jax.nn.softmax(model.logits(hidden), axis=-1), PROPOSALS)
    return {"tokens": chosen, "probability": likely}


def filled_in(context: EvalContext, prompts: list[list[int]]) -> list[str]:
    """The likeliest tokens for each mask token, as "one 51.0 %, two 20.1 %, three 3.0 %; ..."."""
    shape = (context.config.batch_size, max(map(len, prompts)))
    tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)], segments[row, : len(prompt)] = prompt, 1
    found = jax.device_get(context.jit(proposals)(*context.place((tokens, segments))))

    def at(row: int, place: int) -> str:
        pairs = zip(found["tokens"][row, place], found["probability"][row, place], strict=True)
        return ", ".join(f"{context.tokenizer.decode([token]).strip()} {percent(share)}" for token, share in pairs)

    mask = context.tokenizer.need_mask()
    return [
        "; ".join(at(row, place) for place, token in enumerate(prompt) if token == mask)
        for row, prompt in enumerate(prompts)
    ]


def read_samples(directory: Path) -> list[dict]:
    """The lines of DIR/samples.jsonl: {"step", "prompt", "text"}, oldest first; empty if there is no file."""
    path = directory / SAMPLES
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    try:
        return [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise UserError(f"{path} cannot be read ({error}); remove it") from None


def keep_samples(directory: Path, step: int, samples: list[tuple[str, str]]) -> None:
    """Add the samples of a step to DIR/samples.jsonl, in place of those of this step and of later ones."""
    kept = [line for line in read_samples(directory) if line["step"] < step]
    kept += [{"step": step, "prompt": prompt, "text": text} for prompt, text in samples]
    _write(directory, kept)


def drop_samples(directory: Path, after: int) -> None:
    """Drop the samples of later steps than the one that a stage resumes from."""
    if (lines := read_samples(directory)) and lines[-1]["step"] > after:
        _write(directory, [line for line in lines if line["step"] <= after])


def _write(directory: Path, lines: list[dict]) -> None:
    with writing(directory / SAMPLES):
        write_atomic(directory / SAMPLES, "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines))

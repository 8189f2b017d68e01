"""The verb `generate`: continue a prompt, talk, or answer the prompts of a file, with the stages of a run."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm3.checkpoints.load import trained_stages
from llm3.cli.predict import predict
from llm3.config.sampling import Sampling
from llm3.config.schema import RunConfig
from llm3.data.formats import BadRow
from llm3.data.prompts import read_conversation, read_prompt
from llm3.data.sources.inputs import open_input
from llm3.errors import UserError, to_stderr
from llm3.predict.kinds import answers
from llm3.predict.run import choose_kind
from llm3.predict.trained import open_trained
from llm3.report.console import new_console
from llm3.report.units import count
from llm3.serve.asking import ask_for, longest
from llm3.serve.engine import Ask, Engine, Update
from llm3.serve.stages import Served, open_stages
from llm3.stages.workdir import check_record

WRITING = ("answers", "scores")  # what stages that continue texts predict


def generate(
    workdir: Path,
    prompt: str | None = None,
    stage: str | None = None,
    config: RunConfig | None = None,
    raw: bool = False,
    chat: bool = False,
    prompts: str | None = None,
    out: str | None = None,
    max_tokens: int = 64,
    seed: int = 0,
    **sampling: Any,
) -> int:
    """Print a continuation of the prompt from one stage (default: from each of `writing_stages`), while it is made.

    A stage that was trained with a chat template takes the prompt for the user's turn and answers it, up to the end of
    its own turn. It only continues a prompt that is written with the template already, or with `raw`. chat: a
    conversation. prompts, out: files; as `predict --what=answers`, which it calls. sampling: fields of `Sampling`.

    The run holds all that is needed; a given config must match it. Raises UserError.
    """
    settings = Sampling(**sampling)
    if prompts is not None and out is not None and stage is not None:
        length = longest(open_trained(workdir, stage))
        options = {"sequence_length": length, "max_tokens": max_tokens, "seed": seed} | sampling
        return predict(workdir, stage, prompts, out, "answers", config=config, **columns_of(prompts), **options)
    names = [stage] if stage else writing_stages(workdir)
    if config:
        for name in names:
            check_record(workdir, config, name)
    if chat:
        return _talk(_opened(workdir, names[0]), max_tokens, settings, seed)
    assert prompt is not None  # see `check_generate`
    console = new_console()
    for name in names:
        each = _opened(workdir, name)
        if not stage:
            console.rule(name, align="left")
        read = read_prompt(prompt, each.trained.template, each.trained.tokenizer, raw)
        if not read.answers:
            _say(prompt)
        answer(Engine(rows=1), ask_for(each, read, max_tokens, settings, seed), _say)
    return 0


def _opened(workdir: Path, name: str) -> Served:
    (stage,) = open_stages([workdir], [name]).values()
    if why := answers.refusal(stage.trained):
        raise UserError(f"{workdir / name} cannot continue a text: {why}")
    return stage


def writing_stages(workdir: Path) -> list[str]:
    """The stages that predict texts or their scores by default, in order; standard error names the others.

    Raises UserError if there is none.
    """
    kinds = {name: choose_kind(open_trained(workdir, name), None)[0] for name in trained_stages(workdir)}
    found = [name for name, kind in kinds.items() if kind in WRITING]
    others = ", ".join(f"{name} ({kind})" for name, kind in kinds.items() if kind not in WRITING)
    if not found:
        raise UserError(f"{workdir}: no stage was trained to continue texts: {others}; expected --stage=NAME")
    if others:
        to_stderr(f"Left out, not trained to continue texts: {others}; --stage=NAME asks a causal one all the same")
    return found


def columns_of(prompts: str) -> dict[str, Any]:
    """The field of the rows of a file that holds the prompt: messages, prompt or text. Raises UserError."""
    rows = open_input(prompts)
    if rows.is_stream:
        raise UserError("--prompts=-: expected a file")
    if rows.plain:
        return {"text": "text"}
    found = next((each for each in rows.head(1) if not isinstance(each, BadRow)), {})
    for field in ("messages", "prompt", "text"):
        if field in found:
            return {field: field}
    raise UserError(f"--prompts={prompts}: no column messages, prompt or text; `predict` takes others by flags")


def answer(engine: Engine, ask: Ask, say: Callable[[str], None]) -> str:
    """Say an answer as it is made, and return it. The tokens per second, on standard error, leave out compiling."""
    first = engine.submit(ask, lambda update: None)
    engine.look()  # compiles
    engine.cancel(first)
    updates: list[Update] = []
    number, before = engine.submit(ask, updates.append), time.perf_counter()
    said = 0
    try:
        while not (updates and updates[-1].finish):
            engine.look()
            say("".join(each.text for each in updates[said:]))
            said = len(updates)
    except KeyboardInterrupt:
        engine.cancel(number)
        engine.look()
        say(" [stopped]")
    if updates[-1].finish == "failed":
        raise UserError("the answer failed; see the error above")
    made = max(len(each.tokens) for each in updates)
    rate = made / (time.perf_counter() - before)
    say("\n")
    new_console(stderr=True).print(f"{made} tokens, {count(rate)} tokens/s", style="dim")
    return "".join(each.text for each in updates)


def _say(text: str) -> None:
    print(text, end="", flush=True)


def _talk(stage: Served, max_tokens: int, sampling: Sampling, seed: int) -> int:
    """A conversation until the end of standard input; an empty line begins a new one, Ctrl-C stops an answer."""
    template, tokenizer = stage.trained.template, stage.trained.tokenizer
    if not template:
        raise UserError(f"--chat: {stage.trained.where} was trained without a chat template: expected --prompt")
    shown = new_console(stderr=True)
    shown.print("Ctrl-D ends, Ctrl-C stops an answer, an empty line begins a new conversation", style="dim")
    engine, messages = Engine(rows=1), list[dict[str, str]]()
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            return 0
        if not line.strip():
            messages = []
            continue
        messages.append({"role": "user", "content": line})
        read = read_conversation(messages, template, tokenizer)
        text = answer(engine, ask_for(stage, read, max_tokens, sampling, seed), _say)
        messages.append({"role": "assistant", "content": text})

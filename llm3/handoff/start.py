"""The `start` of a stage config: the checkpoint or the pretrained model to start from, and which leaves are new.

llm3 never guesses: a stage resumes from its own checkpoint, starts from the parameters of its parent, or starts from
random initialization.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

from llm3.errors import UserError, nearest
from llm3.files import INIT, check_name
from llm3.remote import workdir_path

NAMED_STEPS = ("latest", "best")  # both need a finished stage


class Start(NamedTuple):
    """The checkpoint that a stage starts from, and the rules for leaves that are not loaded from it."""

    run: Path
    stage: str
    step: int | str  # a number, "latest" or "best"
    fresh: tuple[str, ...]  # regular expressions of model leaves to initialize
    drop: tuple[str, ...]  # regular expressions of parent leaves to discard

    @property
    def title(self) -> str:
        """The name of the parent in messages."""
        return f"{self.run}/{self.stage}"


class ModelStart(NamedTuple):
    """The pretrained model that a stage starts from: a Hugging Face folder, or a name on the hub."""

    model: str
    revision: str | None  # of a name on the hub; None: its newest one
    fresh: tuple[str, ...]  # as in `Start`
    drop: tuple[str, ...]

    @property
    def title(self) -> str:
        """The name of the parent in messages."""
        return self.model


AnyStart = Start | ModelStart


def read_start(value: Any, workdir: Path, where: str) -> AnyStart | None:
    """Parse `start`: None, the name of a stage of this run, or a dict.

    The dict is dict(run=, stage=, step=, fresh=, drop=), where a relative `run` is resolved against the current
    directory, or dict(model=, revision=, fresh=, drop=). Raises UserError.
    """
    if value is None:
        return None
    if isinstance(value, str):
        value = {"stage": value}
    if not isinstance(value, dict):
        raise UserError(
            f"{where}={value!r}: expected the name of a stage, dict({', '.join(Start._fields)}) or "
            f"dict({', '.join(ModelStart._fields)})"
        )
    kind: type[Start] | type[ModelStart] = ModelStart if "model" in value else Start
    for name in value:
        if name not in kind._fields:
            _refuse_field(name, kind, value, where)
    rules = {name: _rules(value.get(name, ()), f"{where}.{name}") for name in ("fresh", "drop")}
    return _model(value, where, rules) if kind is ModelStart else _checkpoint(value, workdir, where, rules)


def _refuse_field(name: str, kind: type[Start] | type[ModelStart], value: dict, where: str) -> None:
    if kind is ModelStart and name in Start._fields:
        raise UserError(
            f"{where}: model={value['model']!r} and {name}={value[name]!r} name two parents; expected a pretrained "
            "model, or a stage of a run"
        )
    if kind is Start and name in ModelStart._fields:
        raise UserError(f"{where}.{name}: needs `model`, the pretrained model to start from")
    fields = dict.fromkeys(kind._fields + (() if "stage" in value else ModelStart._fields))
    raise UserError(f"{where}.{name}: no such field; {nearest(name, fields)}")


def _checkpoint(value: dict, workdir: Path, where: str, rules: dict[str, tuple[str, ...]]) -> Start:
    if "stage" not in value:
        raise UserError(f"{where}: missing 'stage', the name of the stage to start from (or 'model', a pretrained one)")
    for name in ("run", "stage"):
        if not isinstance(value.get(name, ""), str | None):
            raise UserError(f"{where}.{name}={value[name]!r}: expected a str, got {type(value[name]).__name__}")
    if value.get("run"):
        check_name(value["stage"], f"{where}.stage")
    if value["stage"] == INIT and len(value) > 1:
        raise UserError(f"{where}: the untrained model, '{INIT}', has no {', '.join(sorted(value.keys() - {'stage'}))}")
    step = value.get("step", "latest")
    if step not in NAMED_STEPS and (not isinstance(step, int) or isinstance(step, bool) or step < 0):
        raise UserError(f"{where}.step={step!r}: expected a step number, or one of {', '.join(NAMED_STEPS)}")
    run = workdir_path(value["run"], f"{where}.run") if value.get("run") else workdir
    return Start(run, value["stage"], step, **rules)


def _model(value: dict, where: str, rules: dict[str, tuple[str, ...]]) -> ModelStart:
    model, revision = value["model"], value.get("revision")
    if not isinstance(model, str) or not model:
        raise UserError(f"{where}.model={model!r}: expected a Hugging Face folder, or a name on the hub")
    if not isinstance(revision, str | None) or revision == "":
        raise UserError(f"{where}.revision={revision!r}: expected the name of a branch, tag or commit, or None")
    return ModelStart(model, revision, **rules)


def _rules(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, str | list | tuple):
        raise UserError(f"{where}={value!r}: expected a regular expression, or a list of them")
    rules = (value,) if isinstance(value, str) else tuple(value)
    for rule in rules:
        try:
            re.compile(rule)
        except (re.error, TypeError) as error:
            raise UserError(f"{where}: {rule!r} is not a regular expression: {error}") from error
    return rules

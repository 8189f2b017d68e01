"""The `start` of a stage config: the run, stage and step to start from, and which leaves are fresh or dropped.

llm3 never guesses: a stage resumes from its own checkpoint, starts from the parameters of its parent, or starts from
random initialization.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

from llm3.errors import UserError, nearest
from llm3.files import INIT, check_name, local_path

NAMED_STEPS = ("latest", "best")  # both need a finished stage


class Start(NamedTuple):
    """The checkpoint that a stage starts from, and the rules for leaves that are not loaded from it."""

    run: Path
    stage: str
    step: int | str  # a number, "latest" or "best"
    fresh: tuple[str, ...]  # regular expressions of model leaves to initialize
    drop: tuple[str, ...]  # regular expressions of parent leaves to discard


def read_start(value: Any, workdir: Path, where: str) -> Start | None:
    """Parse `start`: None, the name of a stage of this run, or dict(run=, stage=, step=, fresh=, drop=).

    A relative `run` is resolved against the current directory. Raises UserError.
    """
    if value is None:
        return None
    if isinstance(value, str):
        value = {"stage": value}
    if not isinstance(value, dict):
        raise UserError(f"{where}={value!r}: expected the name of a stage or dict({', '.join(Start._fields)})")
    for name in value:
        if name not in Start._fields:
            raise UserError(f"{where}.{name}: no such field; {nearest(name, Start._fields)}")
    if "stage" not in value:
        raise UserError(f"{where}: missing 'stage', the name of the stage to start from")
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
    rules = {name: _rules(value.get(name, ()), f"{where}.{name}") for name in ("fresh", "drop")}
    return Start(
        local_path(value["run"], f"{where}.run") if value.get("run") else workdir, value["stage"], step, **rules
    )


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

"""What starts a stage: its own checkpoint (resume), its parent's parameters (start from), or nothing.

Resume and start-from never guess. Every leaf of the model is loaded from the parent, declared fresh, or the stage
does not start; every leaf of the parent is loaded or declared dropped.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import jax

from llm3.checkpoint import Checkpoints
from llm3.errors import UserError, nearest
from llm3.tree import flatten, unflatten

CHECKPOINTS = "checkpoints"  # the folder of a stage that holds them
INIT = "init"  # the name of the untrained model, as a parent of baselines


class Start(NamedTuple):
    """Where a stage starts from: a run directory, a stage in it, a step; and what is not taken over."""

    run: Path
    stage: str
    step: int | str  # a number or "latest"
    fresh: tuple[str, ...]
    drop: tuple[str, ...]


def read_start(value: Any, workdir: Path, where: str) -> Start | None:
    """A config's `start`: None, the name of a stage of this run, or dict(run=, stage=, step=, fresh=, drop=).

    A relative `run` is relative to the current directory. Raises UserError.
    """
    if value is None:
        return None
    if isinstance(value, str):
        value = {"stage": value}
    if not isinstance(value, dict):
        raise UserError(f"{where}={value!r}: expected a stage's name or dict({', '.join(Start._fields)})")
    for name in value:
        if name not in Start._fields:
            raise UserError(f"{where}.{name}: no such field; {nearest(name, Start._fields)}")
    if "stage" not in value:
        raise UserError(f"{where}: missing 'stage', the name of the stage to start from")
    for name in ("run", "stage"):
        if not isinstance(value.get(name, ""), str | None):
            raise UserError(f"{where}.{name}={value[name]!r}: expected a str, got {type(value[name]).__name__}")
    if value["stage"] == INIT and len(value) > 1:
        raise UserError(f"{where}: the untrained model, '{INIT}', has no {', '.join(sorted(value.keys() - {'stage'}))}")
    step = value.get("step", "latest")
    if step != "latest" and (not isinstance(step, int) or isinstance(step, bool) or step < 0):
        raise UserError(f"{where}.step={step!r}: expected a step number or 'latest'")
    rules = {name: _rules(value.get(name, ()), f"{where}.{name}") for name in ("fresh", "drop")}
    return Start(Path(value["run"]) if value.get("run") else workdir, value["stage"], step, **rules)


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


class Parent(NamedTuple):
    """A checkpoint to start from, found and described, not yet read."""

    start: Start
    checkpoints: Checkpoints
    step: int
    meta: dict

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{path: shape} of its parameters."""
        return {path: tuple(shape) for path, (shape, _) in self.checkpoints.leaves(self.step).items()}

    def describe(self) -> dict:
        """Where it is and what it holds, for the metadata of its child."""
        run = str(self.start.run.resolve())
        digest = self.meta["params_digest"]
        return {"run": run, "stage": self.start.stage, "step": self.step, "params_digest": digest}


def find_parent(start: Start, where: str) -> Parent:
    """The parent's checkpoint. Raises UserError where the run, the stage, a finished checkpoint or the step is not."""
    if not start.run.is_dir():
        siblings = [str(each) for each in start.run.parent.glob("*")] if start.run.parent.is_dir() else []
        raise UserError(f"{where}: the run {start.run} does not exist; {nearest(str(start.run), siblings)}")
    directory = start.run / start.stage / CHECKPOINTS
    if not directory.is_dir():
        stages = [each.parent.name for each in start.run.glob(f"*/{CHECKPOINTS}")]
        raise UserError(
            f"{where}: {start.run} holds no checkpoints of a stage {start.stage!r}: train it first; "
            f"{nearest(start.stage, stages)}"
        )
    checkpoints = Checkpoints(directory, read_only=True)
    steps = checkpoints.steps()
    if not steps:
        raise UserError(f"{where}: {directory} holds no complete checkpoint: train {start.stage} first")
    step = steps[-1] if start.step == "latest" else start.step
    if step not in steps:
        raise UserError(f"{where}.step={step}: {directory} holds the steps {', '.join(map(str, steps))}")
    meta = checkpoints.meta(step)
    if start.step == "latest" and not meta["finished"]:
        raise UserError(
            f"{where}: stage {start.stage} in {start.run} stopped at step {step} of {meta['steps']}: finish it, or "
            f"name the step to start from (start=dict(stage={start.stage!r}, step={step}))"
        )
    return Parent(start, checkpoints, step, meta)


def check_tokenizer(parent: Parent, tokenizer_hash: str, where: str) -> None:
    """Raise UserError where the parent was trained with another tokenizer."""
    if parent.meta["tokenizer_hash"] != tokenizer_hash:
        raise UserError(
            f"{where}: the parent {parent.start.run / parent.start.stage} was trained with the tokenizer "
            f"{parent.meta['tokenizer_hash'][:12]}, this run has {tokenizer_hash[:12]}: in a new --workdir, set "
            f"tokenizer.path={str(parent.start.run / 'tokenizer.json')!r}"
        )


def check_labels(known: list[str], labels: list[str], where: str) -> None:
    """Raise UserError where a task head would be taken over for other classes than it knows."""
    if known != labels:
        raise UserError(
            f"{where}: the parent's task head knows the classes {known}, this stage {labels}: "
            f"name the head in start.fresh=['head/.*']"
        )


class Account(NamedTuple):
    """What becomes of every leaf, by path."""

    loaded: tuple[str, ...]
    fresh: tuple[str, ...]
    dropped: tuple[str, ...]


def account(model: dict[str, tuple[int, ...]], parent: dict[str, tuple[int, ...]], start: Start, where: str) -> Account:
    """Account for every leaf of the model and of the parent, given {path: shape} of each.

    A rule is a regular expression over a whole path. Raises UserError with the whole difference where a leaf is
    missing, left over, or of another shape, and where a rule matches nothing.
    """
    fresh = {path for path in model if any(re.fullmatch(rule, path) for rule in start.fresh)}
    dropped = {path for path in parent if any(re.fullmatch(rule, path) for rule in start.drop)}
    for name, rules, paths in (("fresh", start.fresh, model), ("drop", start.drop, parent)):
        for rule in rules:
            if not any(re.fullmatch(rule, path) for path in paths):
                raise UserError(f"{where}.{name}: {rule!r} matches no leaf; {nearest(rule, paths)}")
    kept = set(parent) - dropped
    problems = [
        f"  {path} {model[path]}: not in the parent; name it in start.fresh if it is to be new"
        for path in sorted(set(model) - fresh - kept)
    ]
    problems += [
        f"  {path} {parent[path]}: not in this model; name it in start.drop if it is not needed"
        for path in sorted(kept - set(model))
    ]
    loaded = sorted((set(model) - fresh) & kept)
    problems += [
        f"  {path}: {model[path]} in this model, {parent[path]} in the parent"
        for path in loaded
        if tuple(model[path]) != tuple(parent[path])
    ]
    if problems:
        raise UserError(f"{where}: {start.run}/{start.stage} does not fit this model:\n" + "\n".join(problems))
    return Account(tuple(loaded), tuple(sorted(fresh)), tuple(sorted(dropped | (kept & fresh))))


def load(parent: Parent, abstract_params: dict, where: str) -> tuple[dict, Account]:
    """The parent's leaves in the shapes' dtypes and shardings, verified by digest; fresh leaves are left out."""
    model = flatten(abstract_params)
    told = account({path: leaf.shape for path, leaf in model.items()}, parent.shapes(), parent.start, where)
    kept = set(told.loaded)
    whole = {
        path: model[path] if path in kept else jax.ShapeDtypeStruct(shape, dtype)
        for path, (shape, dtype) in parent.checkpoints.leaves(parent.step).items()
    }
    params = flatten(parent.checkpoints.load_params(parent.step, unflatten(whole)))
    return unflatten({path: params[path] for path in told.loaded}), told


def trained_stages(workdir: Path) -> list[str]:
    """The stages of a run that have a checkpoint: parents first, baselines last. Raises UserError without any."""
    ranks = {}
    for directory in workdir.glob(f"*/{CHECKPOINTS}"):
        checkpoints = Checkpoints(directory, read_only=True)
        if (step := checkpoints.latest()) is not None:
            meta = checkpoints.meta(step)
            ranks[meta["stage"]] = (meta["config"]["stage"]["baseline"], len(meta["lineage"]), meta["stage"])
    if not ranks:
        raise UserError(f"{workdir} holds no trained stage yet")
    return sorted(ranks, key=ranks.__getitem__)


def lineage(parent: Parent | None) -> list[dict]:
    """The chain of ancestors, the first pretraining step first, from the parent's metadata alone."""
    if parent is None:
        return []
    keys = ("kind", "fresh", "dropped", "reset", "tokenizer_hash", "data", "cost", "version")
    own = parent.describe() | {key: parent.meta.get(key) for key in keys}
    return [*parent.meta["lineage"], own]

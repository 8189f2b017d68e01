"""What starts a stage: its own checkpoint (resume), its parent's parameters (start from), or nothing.

Resume and start-from never guess. Every leaf of the model is loaded from the parent, declared fresh, or the stage
does not start; every leaf of the parent is loaded or declared dropped.
"""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from llm3.checkpoints.best import best_step
from llm3.checkpoints.metadata import not_finite
from llm3.checkpoints.stage_checkpoints import Checkpoints
from llm3.errors import UserError, listed, nearest
from llm3.handoff import vocabulary
from llm3.tree import flatten, unflatten

CHECKPOINTS = "checkpoints"  # the folder of a stage that holds them
INIT = "init"  # the name of the untrained model, as a parent of baselines
NAMED_STEPS = ("latest", "best")  # both of a finished stage


class Start(NamedTuple):
    """Where a stage starts from: a run directory, a stage in it, a step; and what is not taken over."""

    run: Path
    stage: str
    step: int | str  # a number, "latest" or "best"
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
    if step not in NAMED_STEPS and (not isinstance(step, int) or isinstance(step, bool) or step < 0):
        raise UserError(f"{where}.step={step!r}: expected a step number, or one of {', '.join(NAMED_STEPS)}")
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
    leaves: dict[str, tuple[tuple[int, ...], np.dtype]]  # {path: (shape, dtype)} of its parameters
    added: int = 0  # the tokens that this run's vocabulary has behind the parent's

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{path: shape} of its parameters."""
        return {path: shape for path, (shape, _) in self.leaves.items()}

    def describe(self) -> dict:
        """Where it is and what it holds, for the metadata of its child."""
        run, digest = str(self.start.run.resolve()), self.meta["params_digest"]
        return {"run": run, "stage": self.start.stage, "step": self.step, "params_digest": digest}

    def check_dtypes(self, where: str) -> None:
        """Raise UserError where a leaf does not hold floating-point numbers."""
        at = self.checkpoints.directory / str(self.step)
        for path, (_, dtype) in self.leaves.items():
            if not jnp.issubdtype(dtype, jnp.floating):
                raise UserError(f"{where}: {at}: {path} is {dtype}, expected float; start from another step or stage")

    def verify(self, where: str) -> None:
        """Read all of its parameters once, into host memory. Raises UserError where any byte is not what was saved."""
        with _reading(self.checkpoints, self.step, where):
            params = self.checkpoints.load_params(self.step)
        self.check_finite(params, where)

    def check_finite(self, params: dict, where: str) -> None:
        """Raise UserError where a leaf of what was read holds a NaN or an infinity."""
        if wrong := not_finite(flatten(params)):
            at = self.checkpoints.directory / str(self.step)
            raise UserError(f"{where}: {at}: {', '.join(wrong)} not finite (NaN or infinity); start from another step")


@contextmanager
def _reading(checkpoints: Checkpoints, step: int, where: str) -> Iterator[None]:
    """Say of a checkpoint that cannot be read who asked for it, and what else there is."""
    try:
        yield
    except UserError as error:
        others = ", ".join(str(each) for each in checkpoints.steps() if each != step)
        instead = f"start from another step (there: {others})" if others else "train the parent anew"
        raise UserError(f"{where}: {error}: restore it from a copy, or {instead}") from error


def find_parent(start: Start, where: str) -> Parent:
    """The parent's checkpoint. Raises UserError where the run, the stage, a finished checkpoint or the step is not,
    and for a checkpoint whose metadata cannot be read or whose parameters are no floating-point numbers.
    """
    if not start.run.is_dir():
        siblings = [str(each) for each in start.run.parent.glob("*/")] if start.run.parent.is_dir() else []
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
    if start.step not in (*NAMED_STEPS, *steps):
        raise UserError(f"{where}.step={start.step}: {directory} holds the steps {', '.join(map(str, steps))}")
    metas = {}
    for step in steps if start.step == "best" else [steps[-1]] if start.step == "latest" else [start.step]:
        with _reading(checkpoints, step, where):
            metas[step] = checkpoints.meta(step)
    if start.step in NAMED_STEPS and not metas[steps[-1]]["finished"]:
        raise UserError(
            f"{where}: stage {start.stage} in {start.run} stopped at step {steps[-1]} of {metas[steps[-1]]['steps']}: "
            f"finish it, or name the step to start from (start=dict(stage={start.stage!r}, step={steps[-1]}))"
        )
    step = best_step(metas, start.stage, where) if start.step == "best" else max(metas)
    with _reading(checkpoints, step, where):
        parent = Parent(start, checkpoints, step, metas[step], checkpoints.leaves(step))
    parent.check_dtypes(where)
    return parent


def check_tokenizer(parent: Parent, tokenizer_hash: str, where: str, extends: str | None = None) -> bool:
    """Whether the parent knows only the vocabulary that this run's tokenizer extends; `added` is then to be set.

    extends: the hash of the tokenizer that `tokenizer.add` puts tokens behind. Raises UserError where the parent was
    trained with any other tokenizer.
    """
    theirs = parent.meta["tokenizer_hash"]
    if theirs in (tokenizer_hash, extends):
        return theirs != tokenizer_hash
    ours = f"{tokenizer_hash[:12]}, which extends {extends[:12]}" if extends else tokenizer_hash[:12]
    raise UserError(
        f"{where}: the parent {parent.start.run / parent.start.stage} was trained with the tokenizer {theirs[:12]}, "
        f"this run has {ours}: in a new --workdir, set tokenizer.path={str(parent.start.run / 'tokenizer.json')!r}"
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
    extended: tuple[str, ...]  # of the loaded ones, those that new tokens were added to
    cast: dict[str, str]  # of the loaded ones, those that had another dtype, and which

    def said(self) -> dict:
        """For the metadata of the child: what is not simply the parent's."""
        return {key: list(getattr(self, key)) for key in ("fresh", "dropped", "extended")} | {"cast": self.cast}

    def describe(self) -> str:
        """In a line."""
        return "; ".join([f"{len(self.loaded)} leaves loaded", *changes(self.said())])


def changes(said: dict) -> list[str]:
    """What is not simply the parent's, in words; `said` as a child's metadata and its lineage have it."""
    number = Counter((said.get("cast") or {}).values())
    cast = [f"{n} {'leaf' if n == 1 else 'leaves'} cast from {dtype}" for dtype, n in sorted(number.items())]
    cast += [f"frozen kernels rounded to {said['rounded']}"] if said.get("rounded") else []
    words = {"extended": "extended by the mean of the old tokens", "fresh": "fresh", "dropped": "dropped"}
    return cast + [f"{text}: {listed(said[key])}" for key, text in words.items() if said.get(key)]


def account(
    model: dict[str, tuple[int, ...]], parent: dict[str, tuple[int, ...]], start: Start, where: str, added: int = 0
) -> Account:
    """Account for every leaf of the model and of the parent, given {path: shape} of each.

    A rule is a regular expression over a whole path. added: the new tokens behind the parent's vocabulary. Raises
    UserError with the whole difference where a leaf is missing, left over, or of another shape, and where a rule
    matches nothing.
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
    extended = [path for path in loaded if vocabulary.grows(path, parent[path], model[path], added)]
    problems += [
        f"  {path}: {model[path]} in this model, {parent[path]} in the parent; take the parent's model, or name it in "
        f"start.fresh if it is to be new"
        for path in loaded
        if tuple(model[path]) != tuple(parent[path]) and path not in extended
    ]
    if problems:
        raise UserError(f"{where}: {start.run}/{start.stage} does not fit this model:\n" + "\n".join(problems))
    return Account(
        tuple(loaded), tuple(sorted(fresh)), tuple(sorted(dropped | (kept & fresh))), tuple(extended), cast={}
    )


def load(parent: Parent, abstract_params: dict, where: str) -> tuple[dict, Account]:
    """The parent's leaves in the shapes' dtypes and shardings, verified by digest; fresh leaves are left out.

    Leaves that new tokens extend are verified as the parent has them. Raises UserError.
    """
    model, saved = flatten(abstract_params), parent.leaves
    shapes = {path: leaf.shape for path, leaf in model.items()}
    told = account(shapes, parent.shapes(), parent.start, where, parent.added)
    rest = next(iter(model.values())).sharding  # all on the same devices
    rest = NamedSharding(rest.mesh, PartitionSpec()) if isinstance(rest, NamedSharding) else rest
    whole = {path: jax.ShapeDtypeStruct(shape, dtype, sharding=rest) for path, (shape, dtype) in saved.items()}
    whole |= {path: model[path] for path in told.loaded}
    whole |= {path: vocabulary.shrunk(path, model[path], *saved[path]) for path in told.extended}
    with _reading(parent.checkpoints, parent.step, where):
        if parent.checkpoints.meta(parent.step)["params_digest"] != parent.meta["params_digest"]:
            raise UserError(f"{parent.checkpoints.directory / str(parent.step)} has changed since it was found")
        params = flatten(parent.checkpoints.load_params(parent.step, unflatten(whole)))
    params = {path: params[path] for path in told.loaded}
    params |= {path: vocabulary.grown(path, params[path], model[path]) for path in told.extended}
    parent.check_finite(params, where)
    cast = {path: saved[path][1].name for path in told.loaded if saved[path][1] != model[path].dtype}
    return unflatten(params), told._replace(cast=cast)


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
    keys = (
        "kind",
        "fresh",
        "dropped",
        "extended",
        "cast",
        "rounded",
        "reset",
        "tokenizer_hash",
        "data",
        "cost",
        "version",
    )
    own = parent.describe() | {key: parent.meta.get(key) for key in keys}
    return [*parent.meta["lineage"], own]

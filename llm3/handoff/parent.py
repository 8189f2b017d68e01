"""The parent checkpoint that a stage starts from: find it, check it against this run, verify its digests, load it.

Every leaf of the model is either loaded from the parent or declared fresh. Every leaf of the parent is either loaded or
declared dropped. Otherwise the stage does not start.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from llm3.checkpoints.metadata import best_step, not_finite
from llm3.checkpoints.orbax_store import DamagedCheckpoint
from llm3.checkpoints.stage_checkpoints import Checkpoints
from llm3.errors import UserError, nearest
from llm3.files import CHECKPOINTS, TOKENIZER
from llm3.handoff import vocabulary
from llm3.handoff.account import Account, account_for
from llm3.handoff.start import NAMED_STEPS, Start
from llm3.tree import flatten, unflatten


class Parent(NamedTuple):
    """A checkpoint to start from. Its metadata are read, its parameters are not."""

    start: Start
    checkpoints: Checkpoints
    step: int
    meta: dict
    leaves: dict[str, tuple[tuple[int, ...], np.dtype]]  # {path: (shape, dtype)} of the parameters
    added: int = 0  # the number of tokens that this run adds after the parent's vocabulary
    tokens: int = 0  # the size of this run's vocabulary; 0: the rows of the embedding

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{path: shape} of the parameters."""
        return {path: shape for path, (shape, _) in self.leaves.items()}

    def describe(self, workdir: Path) -> dict:
        """Its location and digest, for the metadata of a child in `workdir`; "." is that run, wherever it is moved."""
        found, digest = self.start.run.resolve(), self.meta["params_digest"]
        run = "." if found == workdir.resolve() else str(found)
        return {"run": run, "stage": self.start.stage, "step": self.step, "params_digest": digest}

    def check_dtypes(self, where: str) -> None:
        """Raise UserError if a leaf is not floating-point."""
        at = self.checkpoints.directory / str(self.step)
        for path, (_, dtype) in self.leaves.items():
            if not jnp.issubdtype(dtype, jnp.floating):
                raise UserError(f"{where}: {at}: {path} is {dtype}, expected float; start from another step or stage")

    def verify(self, where: str) -> None:
        """Read all parameters once, into host memory. Raises UserError if any leaf does not match its digest."""
        with _reading(self.checkpoints, self.step, where):
            params = self.checkpoints.load_params(self.step)
        self.check_finite(params, where)

    def check_finite(self, params: dict, where: str) -> None:
        """Raise UserError if a loaded leaf holds a NaN or an infinity."""
        if wrong := not_finite(flatten(params)):
            at = self.checkpoints.directory / str(self.step)
            raise UserError(f"{where}: {at}: {', '.join(wrong)} not finite (NaN or infinity); start from another step")


@contextmanager
def _reading(checkpoints: Checkpoints, step: int, where: str) -> Iterator[None]:
    """Add to any UserError the config field `where` that names the checkpoint, and the steps to use instead."""
    try:
        yield
    except UserError as error:
        others = ", ".join(str(each) for each in checkpoints.steps() if each != step)
        instead = f"start from another step (available: {others})" if others else "train the parent again"
        raise UserError(f"{where}: {error}: restore it from a copy, or {instead}") from error


def find_checkpoint(start: Start, where: str) -> Parent:
    """The parent checkpoint that `start` names.

    Raises UserError if the run, the stage, the step or any finished checkpoint is missing, if the metadata cannot be
    read, or if a parameter is not floating-point.
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
    for step in steps if start.step == "best" else [start.step if isinstance(start.step, int) else steps[-1]]:
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
    """Whether the parent lacks the tokens that this run adds; the caller then sets `added`.

    extends: the hash of the tokenizer that `tokenizer.add` extends. Raises UserError if the parent was trained with
    neither this run's tokenizer nor that one.
    """
    theirs = parent.meta["tokenizer_hash"]
    if theirs in (tokenizer_hash, extends):
        return theirs != tokenizer_hash
    ours = f"{tokenizer_hash[:12]}, which extends {extends[:12]}" if extends else tokenizer_hash[:12]
    raise UserError(
        f"{where}: the parent {parent.start.run / parent.start.stage} was trained with the tokenizer {theirs[:12]}, "
        f"this run has {ours}: in a new --workdir, set tokenizer.path={str(parent.start.run / TOKENIZER)!r}"
    )


def check_labels(known: list[str], labels: list[str], where: str) -> None:
    """Raise UserError if a loaded task head was trained on other classes than this stage has."""
    if known != labels:
        raise UserError(
            f"{where}: the parent's task head has the classes {known}, this stage has {labels}: "
            f"name the head in start.fresh=['head/.*']"
        )


def load(parent: Parent, abstract_params: dict, where: str) -> tuple[dict, Account]:
    """The loaded leaves, verified by digest, in the dtypes and shardings of `abstract_params`; fresh leaves are absent.

    Extended leaves are verified before new tokens are added. Raises UserError.
    """
    model, saved = flatten(abstract_params), parent.leaves
    shapes = {path: leaf.shape for path, leaf in model.items()}
    account = account_for(shapes, parent.shapes(), parent.start, where, parent.added, parent.tokens)
    resized = account.extended + account.padded
    sharding = next(iter(model.values())).sharding  # all leaves are on the same devices
    sharding = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding
    target = {path: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for path, (shape, dtype) in saved.items()}
    target |= {path: model[path] for path in account.loaded}
    target |= {path: vocabulary.before_extension(path, model[path], *saved[path]) for path in resized}
    with _reading(parent.checkpoints, parent.step, where):
        if parent.checkpoints.meta(parent.step)["params_digest"] != parent.meta["params_digest"]:
            raise UserError(f"{parent.checkpoints.directory / str(parent.step)} has changed since it was found")
        params = flatten(parent.checkpoints.load_params(parent.step, unflatten(target)))
    params = {path: params[path] for path in account.loaded}
    growth = parent.added, parent.tokens
    params |= {path: vocabulary.extended(path, params[path], model[path], *growth) for path in resized}
    parent.check_finite(params, where)
    cast = {path: saved[path][1].name for path in account.loaded if saved[path][1] != model[path].dtype}
    return unflatten(params), account._replace(cast=cast)


def holds(run: Path, described: dict) -> bool:
    """Whether a run holds the checkpoint that `Parent.describe` describes, by its digest."""
    checkpoints = Checkpoints(run / described["stage"] / CHECKPOINTS, read_only=True)
    with suppress(DamagedCheckpoint):
        step = described["step"]
        return step in checkpoints.steps() and checkpoints.meta(step)["params_digest"] == described["params_digest"]
    return False


def lineage(parent: Parent | None, workdir: Path) -> list[dict]:
    """The chain of ancestors of a stage in `workdir`, oldest first, from the metadata of the parent alone.

    A relative run is relative to the workdir.
    """
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
        "chat_template",
        "data",
        "cost",
        "version",
    )
    own = parent.describe(workdir) | {key: parent.meta.get(key) for key in keys}
    here, theirs = workdir.resolve(), parent.start.run.resolve()
    runs = [(theirs / link["run"]).resolve() for link in parent.meta["lineage"]]
    before = [
        link | {"run": "." if run == here else str(run)} for link, run in zip(parent.meta["lineage"], runs, strict=True)
    ]
    return [*before, own]

"""The checkpoint that a stage starts from: found, checked against this run, verified, and taken over.

Every leaf of the model is loaded from the parent or declared fresh, and every leaf of the parent is loaded or declared
dropped; otherwise the stage does not start.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from llm3.checkpoints.metadata import best_step, not_finite
from llm3.checkpoints.stage_checkpoints import Checkpoints
from llm3.errors import UserError, nearest
from llm3.files import CHECKPOINTS, TOKENIZER
from llm3.handoff import vocabulary
from llm3.handoff.account import Account, account_for
from llm3.handoff.start import NAMED_STEPS, Start
from llm3.tree import flatten, unflatten


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


def find_checkpoint(start: Start, where: str) -> Parent:
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
        f"this run has {ours}: in a new --workdir, set tokenizer.path={str(parent.start.run / TOKENIZER)!r}"
    )


def check_labels(known: list[str], labels: list[str], where: str) -> None:
    """Raise UserError where a task head would be taken over for other classes than it knows."""
    if known != labels:
        raise UserError(
            f"{where}: the parent's task head knows the classes {known}, this stage {labels}: "
            f"name the head in start.fresh=['head/.*']"
        )


def load(parent: Parent, abstract_params: dict, where: str) -> tuple[dict, Account]:
    """The parent's leaves in the shapes' dtypes and shardings, verified by digest; fresh leaves are left out.

    Leaves that new tokens extend are verified as the parent has them. Raises UserError.
    """
    model, saved = flatten(abstract_params), parent.leaves
    shapes = {path: leaf.shape for path, leaf in model.items()}
    account = account_for(shapes, parent.shapes(), parent.start, where, parent.added)
    rest = next(iter(model.values())).sharding  # all on the same devices
    rest = NamedSharding(rest.mesh, PartitionSpec()) if isinstance(rest, NamedSharding) else rest
    whole = {path: jax.ShapeDtypeStruct(shape, dtype, sharding=rest) for path, (shape, dtype) in saved.items()}
    whole |= {path: model[path] for path in account.loaded}
    whole |= {path: vocabulary.shrunk(path, model[path], *saved[path]) for path in account.extended}
    with _reading(parent.checkpoints, parent.step, where):
        if parent.checkpoints.meta(parent.step)["params_digest"] != parent.meta["params_digest"]:
            raise UserError(f"{parent.checkpoints.directory / str(parent.step)} has changed since it was found")
        params = flatten(parent.checkpoints.load_params(parent.step, unflatten(whole)))
    params = {path: params[path] for path in account.loaded}
    params |= {path: vocabulary.grown(path, params[path], model[path]) for path in account.extended}
    parent.check_finite(params, where)
    cast = {path: saved[path][1].name for path in account.loaded if saved[path][1] != model[path].dtype}
    return unflatten(params), account._replace(cast=cast)


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

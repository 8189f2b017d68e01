"""A checkpoint of llm3 as a parent: find it, check it against this run, verify its digests, read it."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import jax

from llm3 import remote
from llm3.checkpoints.metadata import best_step, not_finite
from llm3.checkpoints.orbax_store import DamagedCheckpoint
from llm3.checkpoints.stage_checkpoints import Checkpoints
from llm3.config.model_schema import ModelConfig, read_model
from llm3.errors import UserError, nearest
from llm3.files import CHECKPOINTS, TOKENIZER
from llm3.handoff.parent import Leaves, check_dtypes, refuse_not_finite
from llm3.handoff.start import NAMED_STEPS, Start
from llm3.tree import flatten, unflatten


class Checkpoint(NamedTuple):
    """A checkpoint to start from: a `Parent`."""

    start: Start
    checkpoints: Checkpoints
    step: int
    meta: dict
    leaves: Leaves

    @property
    def title(self) -> str:
        """RUN/STAGE step N"""
        return f"{self.start.run / self.start.stage} step {self.step}"

    @property
    def place(self) -> str:
        """The folder of the step."""
        return str(self.checkpoints.directory / str(self.step))

    @property
    def remedy(self) -> str:
        """Another checkpoint."""
        return "start from another step or stage"

    @property
    def model(self) -> ModelConfig:
        """The model of the stage."""
        return read_model(self.meta["model"])

    @property
    def labels(self) -> list[str]:
        """The classes of the stage."""
        return self.meta["labels"]

    def lacks_new_tokens(self, tokenizer_hash: str, where: str, extends: str | None = None) -> bool:
        """As `Parent.lacks_new_tokens`."""
        theirs = self.meta["tokenizer_hash"]
        if theirs in (tokenizer_hash, extends):
            return theirs != tokenizer_hash
        ours = f"{tokenizer_hash[:12]}, which extends {extends[:12]}" if extends else tokenizer_hash[:12]
        raise UserError(
            f"{where}: the parent {self.start.run / self.start.stage} was trained with the tokenizer {theirs[:12]}, "
            f"this run has {ours}: in a new --workdir, set tokenizer.path={str(self.start.run / TOKENIZER)!r}"
        )

    def describe(self, workdir: Path) -> dict:
        """As `Parent.describe`; the run "." is that of the child, wherever it is moved."""
        found, digest = self.start.run.resolve(), self.meta["params_digest"]
        run = "." if found == workdir.resolve() else remote.address(found)
        return {"run": run, "stage": self.start.stage, "step": self.step, "params_digest": digest}

    def lineage(self, workdir: Path) -> list[dict]:
        """As `Parent.lineage`, from the metadata of the checkpoint alone; a relative run is relative to the workdir."""
        own = self.describe(workdir) | {key: self.meta.get(key) for key in LINEAGE_KEYS}
        here, theirs = remote.address(workdir), self.start.run.resolve()

        def seen_from_here(link: dict) -> dict:
            if "run" not in link:  # a pretrained model belongs to no run
                return link
            run = link["run"] if link["run"].startswith(remote.SCHEMES) else remote.address(theirs / link["run"])
            return link | {"run": "." if run == here else run}

        return [*map(seen_from_here, self.meta["lineage"]), own]

    def verify(self, where: str) -> None:
        """Read all parameters once, some leaves at a time. Raises UserError if any leaf does not match its digest."""
        with _reading(self.checkpoints, self.step, where):
            groups = self.checkpoints.verified_params(self.step)
            wrong = [path for leaves in groups for path in not_finite(leaves)]
        refuse_not_finite(self, wrong, where)

    def read(self, wanted: dict[str, jax.ShapeDtypeStruct], where: str) -> dict[str, jax.Array]:
        """As `Parent.read`, each leaf verified by its digest."""
        with _reading(self.checkpoints, self.step, where):
            if self.checkpoints.meta(self.step)["params_digest"] != self.meta["params_digest"]:
                raise UserError(f"{self.place} has changed since it was found")
            return flatten(self.checkpoints.load_params(self.step, unflatten(wanted), some=True))


# what a link of a lineage says besides the location
LINEAGE_KEYS = (
    *("kind", "fresh", "dropped", "extended", "cast", "rounded", "reset"),
    *("tokenizer_hash", "chat_template", "data", "steps", "early_stopping", "amendments", "cost", "version"),
)


@contextmanager
def _reading(checkpoints: Checkpoints, step: int, where: str) -> Iterator[None]:
    """Add to any UserError the config field `where` that names the checkpoint, and the steps to use instead."""
    try:
        yield
    except UserError as error:
        others = ", ".join(str(each) for each in checkpoints.steps() if each != step)
        instead = f"start from another step (available: {others})" if others else "train the parent again"
        raise UserError(f"{where}: {error}: restore it from a copy, or {instead}") from error


def find_checkpoint(start: Start, where: str) -> Checkpoint:
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
        parent = Checkpoint(start, checkpoints, step, metas[step], checkpoints.leaves(step))
    check_dtypes(parent, where)
    return parent


def holds(run: Path, described: dict) -> bool:
    """Whether a run holds the checkpoint that `Checkpoint.describe` describes, by its digest."""
    checkpoints = Checkpoints(run / described["stage"] / CHECKPOINTS, read_only=True)
    with suppress(DamagedCheckpoint):
        step = described["step"]
        return step in checkpoints.steps() and checkpoints.meta(step)["params_digest"] == described["params_digest"]
    return False

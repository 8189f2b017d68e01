"""A pretrained model as a parent: a Hugging Face folder, or a name on the hub.

A run keeps a description of the model that it began with, in WORKDIR/start/model.json. Finished stages, and their
children, need the folder no more. A stage that starts from it checks that the folder still has the same digest.
"""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llm3.config.model_schema import ModelConfig
from llm3.distributed import processes
from llm3.errors import UserError
from llm3.files import MODEL, START, read_json, write_json
from llm3.handoff.parent import Leaves, check_dtypes
from llm3.handoff.start import ModelStart
from llm3.interop.folder import Folder, open_folder


class Described(NamedTuple):
    """What a run keeps of a pretrained model."""

    model: str  # its folder or name, as the config gives it
    revision: str | None  # the commit of a model from the hub
    digest: str  # of the files; "" where none was computed yet
    family: str
    max_length: int | None  # the longest context that it was made for, in tokens
    labels: list[str]
    leaves: list[str]

    @property
    def title(self) -> str:
        """Its name, with the revision."""
        return self.model + (f" at {self.revision}" if self.revision else "")


class Pretrained(NamedTuple):
    """A pretrained model to start from: a `Parent`. expected: the digest that the run began with, "" before it did."""

    start: ModelStart
    folder: Folder
    expected: str
    leaves: Leaves

    @property
    def title(self) -> str:
        """The name of the model, with its revision."""
        return self.start.model + (f" at {self.folder.revision}" if self.folder.revision else "")

    @property
    def place(self) -> str:
        """The folder."""
        return str(self.folder.path)

    @property
    def remedy(self) -> str:
        """Another copy."""
        return "get the model again"

    @property
    def model(self) -> ModelConfig:
        """The model that config.json describes."""
        return self.folder.model

    @property
    def labels(self) -> list[str]:
        """The classes that config.json names, if the files hold a task head."""
        return list(self.folder.labels)

    @property
    def meta(self) -> dict:
        """As `Parent.meta`. What it was trained on, and with which template, is not known."""
        return {"model_family": self.folder.family, "model_max_length": self.folder.max_length, "chat_template": ""}

    def digest(self) -> str:
        """The digest of the files, which the first process reads for all."""
        return processes.broadcast_from_first(lambda: self.folder.digest)

    def lacks_new_tokens(self, tokenizer_hash: str, where: str, extends: str | None = None) -> bool:
        """As `Parent.lacks_new_tokens`: a model of others has no token that this run adds."""
        return extends is not None

    def describe(self, workdir: Path) -> dict:
        """As `Parent.describe`. "params_digest" is that of the files."""
        folder = self.folder
        return {
            "model": self.start.model if folder.revision else str(folder.path),
            "revision": folder.revision,
            "family": folder.family,
            "params_digest": self.digest(),
        }

    def lineage(self, workdir: Path) -> list[dict]:
        """As `Parent.lineage`: nothing is known of its ancestors."""
        return [self.describe(workdir)]

    def verify(self, where: str) -> None:
        """Read all files once. Raises UserError if they are not those that the run began with."""
        if self.expected and (now := self.digest()) != self.expected:
            raise UserError(
                f"{where}: {self.title} has changed since this run began (sha256 of its files {self.expected[:12]} "
                f"then, {now[:12]} now): restore it, or use another --workdir"
            )

    def read(self, wanted: dict[str, jax.ShapeDtypeStruct], where: str) -> dict[str, jax.Array]:
        """As `Parent.read`, slice by slice, so that no host holds the model."""
        self.verify(where)
        return {path: self.folder.read(path, like) for path, like in wanted.items()}


def find_pretrained(start: ModelStart, workdir: Path, where: str) -> Pretrained:
    """The model that `start` names. Raises UserError for a folder that cannot be read."""
    kept, revision = kept_description(workdir), start.revision
    if kept and kept.model == start.model:
        revision = revision or kept.revision  # the hub may have a newer one by now
    folder = open_folder(start.model, revision, f"{where}.model")
    expected = kept.digest if kept else ""
    leaves = {path: (shape, jnp.dtype(dtype)) for path, (shape, dtype) in folder.leaves.items()}
    parent = Pretrained(start, folder, expected, leaves)
    check_dtypes(parent, where)
    return parent


def described(start: ModelStart, workdir: Path, where: str) -> Described:
    """What the workdir keeps of its model, else what the folder that `start` names says. Raises UserError.

    Reads config.json and the headers of the files only; the digest is "" if it is not kept.
    """
    if kept := kept_description(workdir):
        return kept
    folder = open_folder(start.model, start.revision, f"{where}.model")
    return _described(start, folder, "")


def kept_description(workdir: Path) -> Described | None:
    """The description that a workdir keeps, if any. Raises UserError if it is damaged."""
    path = workdir / START / MODEL
    if (kept := read_json(path)) is None:
        return None
    if not isinstance(kept, dict) or kept.keys() != set(Described._fields):
        raise UserError(f"{path} is damaged: restore it, or use another --workdir")
    return Described(**kept)


def same_model(workdir: Path, named: dict, where: str) -> bool:
    """Whether a `start` of a config, dict(model=, revision=), names the model that a workdir keeps, perhaps moved."""
    kept = kept_description(workdir)
    folder = open_folder(named["model"], named.get("revision"), f"{where}.model")
    return kept is not None and kept.digest == folder.digest


def keep_description(parent: Pretrained, workdir: Path) -> None:
    """Write the description of a model into a workdir, with the digest of its files, unless it is there."""
    if parent.expected:
        return
    known = _described(parent.start, parent.folder, parent.digest())._asdict()
    processes.broadcast_from_first(lambda: write_json(workdir / START / MODEL, known))


def _described(start: ModelStart, folder: Folder, digest: str) -> Described:
    return Described(
        model=start.model,
        revision=folder.revision,
        digest=digest,
        family=folder.family,
        max_length=folder.max_length,
        labels=list(folder.labels),
        leaves=sorted(folder.leaves),
    )

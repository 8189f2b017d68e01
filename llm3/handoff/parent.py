"""The parent that a stage starts from, and how its parameters are loaded.

A parent is a checkpoint of llm3 (`handoff.checkpoint`) or a pretrained model (`handoff.pretrained`). Every leaf of the
model is either loaded from the parent or declared fresh. Every leaf of the parent is either loaded or declared dropped.
Otherwise the stage does not start.
"""

from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from llm3.checkpoints.metadata import not_finite
from llm3.config.model_schema import ModelConfig
from llm3.errors import UserError
from llm3.handoff import vocabulary
from llm3.handoff.account import Account, account_for
from llm3.handoff.start import AnyStart
from llm3.handoff.vocabulary import NO_CHANGE, VocabularyChange
from llm3.tree import flatten, unflatten

Leaves = dict[str, tuple[tuple[int, ...], np.dtype]]  # {canonical path: (shape, dtype)}


class Parent(Protocol):
    """What a stage starts from. Its description is read, its parameters are not."""

    @property
    def start(self) -> AnyStart:
        """The `start` that names the parent."""

    @property
    def title(self) -> str:
        """The parent, and where it is, for messages: "RUN/STAGE step 10", or the name of a model."""

    @property
    def place(self) -> str:
        """The folder of its parameters, for messages about a leaf."""

    @property
    def remedy(self) -> str:
        """What to do if a leaf cannot be used."""

    @property
    def leaves(self) -> Leaves:
        """The shapes and dtypes of the parameters, by canonical path."""

    @property
    def model(self) -> ModelConfig:
        """The model that the parameters belong to."""

    @property
    def labels(self) -> list[str]:
        """The classes of its task head, [] without one."""

    @property
    def meta(self) -> dict:
        """What a child's metadata take over: "model_family", "model_max_length" and "chat_template" (its hash)."""

    def lacks_new_tokens(self, tokenizer_hash: str, where: str, extends: str | None = None) -> bool:
        """Whether the parent lacks the tokens that this run adds.

        extends: the hash of the tokenizer that `tokenizer.add` extends. Raises UserError if the parent was trained with
        neither this run's tokenizer nor that one.
        """

    def describe(self, workdir: Path) -> dict:
        """Its location and digest, for the metadata of a child in `workdir`."""

    def lineage(self, workdir: Path) -> list[dict]:
        """The chain of ancestors of a child in `workdir`, oldest first, the parent last."""

    def verify(self, where: str) -> None:
        """Read all of it once. Raises UserError if anything does not match its digest or is not finite."""

    def read(self, wanted: dict[str, jax.ShapeDtypeStruct], where: str) -> dict[str, jax.Array]:
        """The wanted leaves by path, in their dtypes and shardings. Raises UserError if the parent has changed."""


def check_dtypes(parent: Parent, where: str) -> None:
    """Raise UserError if a leaf of the parent is not floating-point."""
    for path, (_, dtype) in parent.leaves.items():
        if not jnp.issubdtype(dtype, jnp.floating):
            raise UserError(f"{where}: {parent.place}: {path} is {dtype}, expected float; {parent.remedy}")


def check_finite(parent: Parent, params: dict[str, Any], where: str) -> None:
    """Raise UserError if a loaded leaf, {path: array}, holds a NaN or an infinity."""
    refuse_not_finite(parent, not_finite(params), where)


def refuse_not_finite(parent: Parent, wrong: list[str], where: str) -> None:
    """Raise UserError if there is a path of a leaf that holds a NaN or an infinity."""
    if wrong:
        raise UserError(f"{where}: {parent.place}: {', '.join(wrong)} not finite (NaN or infinity); {parent.remedy}")


def check_labels(known: list[str], labels: list[str], where: str) -> None:
    """Raise UserError if a loaded task head was trained on other classes than this stage has."""
    if known != labels:
        raise UserError(
            f"{where}: the parent's task head has the classes {known}, this stage has {labels}: "
            f"name the head in start.fresh=['head/.*']"
        )


def load(
    parent: Parent, abstract_params: dict, where: str, change: VocabularyChange = NO_CHANGE
) -> tuple[dict, Account]:
    """The loaded leaves, verified, in the dtypes and shardings of `abstract_params`; fresh leaves are absent.

    change: between the vocabularies of the parent and of the model; leaves are verified before it. Raises UserError.
    """
    model, saved = flatten(abstract_params), parent.leaves
    shapes = {path: leaf.shape for path, leaf in model.items()}
    before = {path: shape for path, (shape, _) in saved.items()}
    account = account_for(shapes, before, parent.start, where, change)
    wanted = {path: model[path] for path in account.loaded}
    resized = (*account.extended, *account.padded)
    wanted |= {path: vocabulary.before_change(path, model[path], *saved[path]) for path in resized}
    params = parent.read(wanted, where)
    params |= {path: vocabulary.changed(path, params[path], model[path], change) for path in resized}
    check_finite(parent, params, where)
    cast = {path: saved[path][1].name for path in account.loaded if saved[path][1] != model[path].dtype}
    return unflatten(params), account._replace(cast=cast)

"""The checkpoints of a stage. Those of a stage with frozen leaves hold what trains, and rest on one complete base.

The base, STAGE/base/0, is written once, at the stage's start. A checkpoint that rests on it says so in its metadata:
`base` is the `params_digest` of the base, and its own `params_digest` covers that. Readers do not see the difference.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llm3.checkpoints.delta import check_pieces, overlay, pieces_like
from llm3.checkpoints.metadata import digests_of, on_host, saved_shapes
from llm3.checkpoints.orbax_store import DamagedCheckpoint, Store
from llm3.errors import UserError, listed
from llm3.tree import combine_digests, flatten, unflatten

BASE = "base"  # the folder of a stage that holds its base, and the key of its digest in the metadata


class Wanted(NamedTuple):
    """What a resuming stage needs at some step, as trees of jax.ShapeDtypeStruct."""

    params: dict  # canonical
    opt: Any


class Restored(NamedTuple):
    """What `load_newest` found; params: canonical; skipped: a line for each newer step that is damaged, and why."""

    step: int
    params: dict
    opt: Any
    meta: dict
    skipped: list[str]


class Checkpoints:
    """The checkpoints of one stage in `directory`, which stands beside its base.

    keep: how many of the latest steps stay. best: the name of a metric; the step where it is lowest stays as well.
    read_only: never creates, moves or deletes anything. Raises UserError for keep < 1.
    """

    def __init__(self, directory: Path, *, keep: int = 2, best: str | None = None, read_only: bool = False):
        self._steps = Store(directory, keep=keep, best=best, read_only=read_only)
        self.directory = self._steps.directory
        self._base = Store(self.directory.parent / BASE, keep=1, read_only=read_only)
        self._base_digest: str | None = None  # of the base that `save_base` has found or written

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """The steps of the finished checkpoints, ascending."""
        return self._steps.steps()

    def latest(self) -> int | None:
        """The highest step, whichever file is the newest."""
        return self._steps.latest()

    def meta(self, step: int) -> dict:
        """The metadata of a step. Raises UserError where there is no such step, and DamagedCheckpoint."""
        return self._steps.meta(step)

    def save_base(self, params: dict, meta: dict, trained: dict | None = None) -> None:
        """See to it that there is a base for what is frozen; to be called whenever a stage starts or resumes.

        params: the canonical parameters. trained: the segmented leaves that may differ from the base by now, for a
        stage that resumes; default none. A base that holds all the rest of `params` stays as it is. Any other one (a
        run died before its first checkpoint, or it is damaged) is replaced by `params`, in the background.

        Raises UserError where checkpoints rest on a base that is neither there nor equal to `params`.
        """
        expected = digests_of(flatten(params))
        digest = self._matching_base(expected, flatten(trained or {}))
        found = digest is not None
        digest = digest or combine_digests(expected)
        if others := [step for step, base in self._bases().items() if base != digest]:
            raise UserError(
                f"{self._base.directory} does not hold the frozen parameters of this stage, on which the checkpoints "
                f"of step {listed(map(str, others))} in {self.directory} rest: bring it back, or move them away"
            )
        if not found:
            if self._base.steps():
                self._base.remove(0)
            self._base.save(0, params, {}, meta)
        self._base_digest = digest

    def save(
        self,
        step: int,
        params: dict,
        opt: Any,
        meta: dict,
        metrics: Mapping[str, float] | None = None,
        *,
        partial: bool = False,
    ) -> None:
        """Save in the background, as in `Store`; a complete checkpoint of canonical `params`, unless `partial`.

        partial: `params` is the segmented tree of what trains; the rest is that of the base. Raises UserError as well
        where a leaf does not fit the base, and where the base is not as `save_base` left it.
        """
        meta = {key: value for key, value in meta.items() if key != BASE}  # a resumed stage brings that of its start
        if partial and self._base_digest is None:
            raise RuntimeError("save_base comes before a save of what trains alone")
        self.wait()
        if partial:
            base = self._base_of(f"step {step}", self._base_digest)
            check_pieces(f"step {step}", flatten(params), saved_shapes(base, "params"))
            meta[BASE] = self._base_digest
        self._steps.save(step, params, opt, meta, metrics)

    def wait(self) -> None:
        """Return when the last save and that of the base are finished. Raises NotWritten as in `Store`."""
        self._base.wait()
        self._steps.wait()

    def close(self) -> None:
        """Wait for the last saves and release what Orbax holds. Raises NotWritten as in `Store`."""
        try:
            self._base.close()
        finally:
            self._steps.close()

    def leaves(self, step: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """{canonical path: (shape, dtype)} of the parameters of a step, without reading them."""
        meta = self.meta(step)
        return saved_shapes(self._base_of(f"step {step}", meta[BASE]) if BASE in meta else meta, "params")

    def load_params(self, step: int, abstract: dict | None = None) -> dict:
        """The canonical parameters of a step, as in `Store`, also where they rest on the base."""
        meta = self.meta(step)
        if BASE not in meta:
            return self._steps.load_params(step, abstract)
        self._base_of(f"step {step}", meta[BASE])
        base = flatten(self.base(abstract))
        like = None if abstract is None else pieces_like(flatten(abstract), saved_shapes(meta, "params"))
        return unflatten(overlay(base, flatten(self.load_trainable(step, like and unflatten(like)))))

    def load_trainable(self, step: int, abstract: dict | None = None) -> dict:
        """The segmented tree of what trained, as a checkpoint that rests on the base holds it; see `load_params`."""
        if BASE not in self.meta(step):
            raise UserError(f"{self.directory / str(step)} is complete: it does not say what trained")
        return self._steps.load_params(step, abstract)

    def load_opt(self, step: int, abstract: Any) -> Any:
        """The optimizer state of a step, as in `Store`."""
        return self._steps.load_opt(step, abstract)

    def base(self, abstract: dict | None = None) -> dict:
        """The canonical parameters of the base; the rest as in `load_params`."""
        self._base.wait()
        return self._base.load_params(0, abstract)

    def load_newest(self, wanted: Callable[[int], Wanted]) -> Restored | None:
        """The highest step that is intact; None only where there is no checkpoint at all.

        wanted: what to load at a step. A damaged step stays where it is until the next save, which renames it to
        <step>.damaged; all that rest on a damaged base are damaged. Raises UserError where none can be read, and where
        an intact one has other paths or shapes.
        """
        skipped: list[str] = []
        for step in reversed(self.steps()):
            try:
                like = wanted(step)
                params, opt = self.load_params(step, like.params), self.load_opt(step, like.opt)
                return Restored(step, params, opt, self.meta(step), skipped)
            except DamagedCheckpoint as error:
                self._steps.damaged.add(step)
                skipped.append(f"step {step} is damaged and was skipped: {error}")
        if skipped:
            reasons = "\n".join(f"  {line}" for line in skipped)
            raise UserError(
                f"{self.directory}: none of its checkpoints can be read; move it away to start anew\n{reasons}"
            )
        return None

    def _base_of(self, what: str, digest: str | None) -> dict:
        """The metadata of the base, which must have this digest."""
        path = self._base.directory / "0"
        if 0 not in self._base.steps():
            raise DamagedCheckpoint(f"{path}, on which {what} rests, is missing")
        meta = self._base.meta(0)
        if meta["params_digest"] != digest:
            raise DamagedCheckpoint(f"{path} holds other parameters than those on which {what} rests")
        return meta

    def _matching_base(self, expected: dict[str, str], trained: dict[str, Any]) -> str | None:
        """The digest of the base, if it is intact and has these digests once `trained` is laid over."""
        try:
            base, meta = flatten(self.base()), self._base.meta(0)
            check_pieces("what trains", trained, saved_shapes(meta, "params"))
        except UserError:
            return None
        host = {path: on_host(leaf) for path, leaf in trained.items()}
        return meta["params_digest"] if digests_of(overlay(base, host)) == expected else None

    def _bases(self) -> dict[int, str]:
        """{step: the base on which it rests}, without the steps that were found to be damaged."""
        bases = {}
        for step in self.steps():
            with suppress(DamagedCheckpoint):
                bases[step] = self.meta(step).get(BASE)
        return {step: base for step, base in bases.items() if base and step not in self._steps.damaged}

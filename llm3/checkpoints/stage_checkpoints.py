"""The checkpoints of a stage. A stage with frozen parameters saves delta checkpoints, which patch one full base.

The base, STAGE/base/0, is written once, when the stage starts. The metadata of a delta checkpoint names it: `BASE` is
the `params_digest` of the base, and the `params_digest` of the delta covers it. Readers see no difference.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llm3.checkpoints.delta import abstract_slices, check_slices, patch
from llm3.checkpoints.digests import digests_of
from llm3.checkpoints.metadata import saved_shapes
from llm3.checkpoints.orbax_store import DamagedCheckpoint, Store
from llm3.checkpoints.saved_step import SavedStep
from llm3.distributed import agreement, processes
from llm3.errors import UserError, listed
from llm3.files import BASE
from llm3.segments import canonical_path
from llm3.tree import combine_digests, flatten, unflatten


class Wanted(NamedTuple):
    """The parameters and optimizer state that a stage needs to resume, as trees of jax.ShapeDtypeStruct."""

    params: dict  # canonical
    opt: Any


class Restored(NamedTuple):
    """The checkpoint that `load_newest` restored. params: canonical. skipped: a line for each newer, damaged step."""

    step: int
    params: dict
    opt: Any
    meta: dict
    skipped: list[str]


class Checkpoints:
    """The checkpoints of one stage in `directory`, next to the directory of its base.

    Saves are asynchronous in a `with` block only, as in `Store`.

    keep: the number of latest steps to keep. best: the name of a metric; the step where it is lowest is kept too.
    every: steps that are a multiple of it are kept too; 0: none. read_only: never creates, moves or deletes anything.
    Raises UserError for keep < 1.
    """

    def __init__(
        self, directory: Path, *, keep: int = 2, best: str | None = None, every: int = 0, read_only: bool = False
    ):
        self._steps = Store(directory, keep=keep, best=best, every=every, read_only=read_only)
        self.directory = self._steps.directory
        self._base = Store(Path(directory).parent / BASE, keep=1, read_only=read_only)
        self._base_digest: str | None = None  # set by `save_base`

    def __enter__(self) -> "Checkpoints":
        self._base.__enter__()
        self._steps.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._base.__exit__()
        finally:
            self._steps.__exit__()

    def steps(self) -> list[int]:
        """The steps of the finished checkpoints, ascending."""
        return self._steps.steps()

    def latest(self) -> int | None:
        """The highest step, regardless of file times."""
        return self._steps.latest()

    def meta(self, step: int) -> dict:
        """The metadata of a step. Raises UserError if there is no such step, DamagedCheckpoint if it is damaged."""
        return self._steps.meta(step)

    def newest_meta(self) -> dict | None:
        """The metadata of the highest step of which all processes can read it; None: there is none."""
        for step in reversed(processes.broadcast_from_first(self.steps)):
            with suppress(DamagedCheckpoint):
                return agreement.all_or_none(partial(self.meta, step), DamagedCheckpoint)
        return None

    def save_base(self, params: dict, meta: dict, trained: dict | None = None) -> None:
        """Ensure that a base with the frozen parameters exists; call it whenever a stage starts or resumes.

        params: the canonical parameters. trained: the segmented leaves that training may have changed, if the stage
        resumes. A base that equals `params` in all other leaves is kept. Any other base (the run died before its first
        checkpoint, or the base is damaged) is replaced by `params`, in the background.

        Raises UserError if delta checkpoints depend on a base that is missing and differs from `params`.
        """
        leaves = flatten(params)
        expected = digests_of(leaves)
        digest = self._matching_base(leaves, expected, flatten(trained or {}))
        found = digest is not None
        digest = digest or combine_digests(expected)
        if others := [step for step, base in self._bases().items() if base != digest]:
            raise UserError(
                f"{self._base.directory} does not hold the frozen parameters of this stage, needed by the delta "
                f"checkpoints of step {listed(map(str, others))} in {self.directory}: restore it, or move them away"
            )
        if not found:
            if processes.broadcast_from_first(self._base.steps):
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
        delta: bool = False,
    ) -> None:
        """Save in the background, as `Store.save`: a full checkpoint of canonical `params`, unless `delta`.

        delta: `params` is the segmented tree of the trainable parameters; the base holds the others. Also raises
        UserError if a leaf does not fit the base, or if the base has changed since `save_base`.
        """
        meta = {key: value for key, value in meta.items() if key != BASE}  # a resumed stage passes its old metadata
        if delta and self._base_digest is None:
            raise RuntimeError("call save_base before saving a delta checkpoint")
        self.wait()
        if delta:
            base = self._base_of(f"step {step}", self._base_digest)
            check_slices(f"step {step}", flatten(params), saved_shapes(base.meta, "params"))
            meta[BASE] = self._base_digest
        self._steps.save(step, params, opt, meta, metrics)

    def wait(self) -> None:
        """Return when the last save and the save of the base are finished. Raises NotWritten as `Store.wait`."""
        self._base.wait()
        self._steps.wait()

    def close(self) -> None:
        """Wait for the last saves and close the Orbax checkpointers. Raises NotWritten as `Store.close`."""
        try:
            self._base.close()
        finally:
            self._steps.close()

    def leaves(self, step: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """{canonical path: (shape, dtype)} of the parameters of a step, without reading them."""
        meta = self.meta(step)
        return saved_shapes(self._base_of(f"step {step}", meta[BASE]).meta if BASE in meta else meta, "params")

    def load_params(self, step: int, abstract: dict | None = None, *, some: bool = False) -> dict:
        """The canonical parameters of a step, from a full or a delta checkpoint, as `Store.load_params`.

        some: whether `abstract` may lack leaves, which are then not read.
        """
        return self._params(self._agreed(step), step, abstract, some)

    def verified_params(self, step: int) -> Iterator[dict[str, Any]]:
        """All parameters that a step needs, {path: leaf}, some at a time, each checked against its digest.

        They are spread over all devices. Of a delta checkpoint, these are the leaves of its base and then its own.
        """
        saved = self._agreed(step)
        if BASE in saved.meta:
            yield from self._agreed_base(step, saved.meta[BASE]).verified_params()
        yield from saved.verified_params()

    def load_trainable(self, step: int, abstract: dict | None = None) -> dict:
        """The segmented tree of trained parameters in a delta checkpoint; see `load_params`."""
        if BASE not in self.meta(step):
            raise UserError(
                f"{self.directory / str(step)} is a full checkpoint: it does not record which parameters were trained"
            )
        return self._steps.load_params(step, abstract)

    def load_opt(self, step: int, abstract: Any) -> Any:
        """The optimizer state of a step, as `Store.load_opt`."""
        return self._steps.load_opt(step, abstract)

    def base(self, abstract: dict | None = None) -> dict:
        """The canonical parameters of the base, as `load_params`."""
        self._base.wait()
        return self._base.load_params(0, abstract)

    def load_newest(self, wanted: Callable[[int], Wanted]) -> Restored | None:
        """The highest intact step; None only if there is no checkpoint at all.

        Of several processes, the first one's list of steps counts, and a step that one of them cannot read is damaged.
        wanted: {step: trees to load}, as a function. The next save renames a damaged step to <step>.damaged. All delta
        checkpoints of a damaged base are damaged. Raises UserError if no checkpoint can be read, or if an intact one
        has other paths or shapes.
        """
        skipped: list[str] = []
        for step in reversed(processes.broadcast_from_first(self.steps)):
            try:
                like = wanted(step)
                saved = self._agreed(step)
                params, opt = self._params(saved, step, like.params), saved.load_opt(like.opt)
                return Restored(step, params, opt, saved.meta, skipped)
            except DamagedCheckpoint as error:
                self._steps.damaged.add(step)
                skipped.append(f"step {step} is damaged and was skipped: {error}")
        if skipped:
            reasons = "\n".join(f"  {line}" for line in skipped)
            raise UserError(
                f"{self.directory}: none of its checkpoints can be read: restore one from a copy, or use another "
                f"--workdir to start again\n{reasons}"
            )
        return None

    def _agreed(self, step: int) -> SavedStep:
        """A step, damaged for all processes if one of them cannot read its metadata."""
        return agreement.all_or_none(partial(self._steps.saved, step), DamagedCheckpoint)

    def _agreed_base(self, step: int, digest: str) -> SavedStep:
        """The base of a step, as `_base_of`, damaged for all processes if it is for one of them."""
        return agreement.all_or_none(partial(self._base_of, f"step {step}", digest), DamagedCheckpoint)

    def _params(self, saved: SavedStep, step: int, abstract: dict | None, some: bool = False) -> dict:
        """The parameters of a step, patched into the base if it is a delta checkpoint."""
        if BASE not in saved.meta:
            return saved.load_params(abstract, some=some)
        base = flatten(self._agreed_base(step, saved.meta[BASE]).load_params(abstract, some=some))
        shapes = saved_shapes(saved.meta, "params")
        slices = {path: shape for path, shape in shapes.items() if not some or canonical_path(path) in base}
        like = None if abstract is None else unflatten(abstract_slices(flatten(abstract), slices))
        return unflatten(patch(base, flatten(saved.load_params(like, some=some))))

    def _base_of(self, what: str, digest: str | None) -> SavedStep:
        """The base, which must have this digest. what: the checkpoint that needs it."""
        self._base.wait()
        path = self._base.directory / "0"
        if 0 not in self._base.steps():
            raise DamagedCheckpoint(f"{path}, the base of {what}, is missing")
        saved = self._base.saved(0)
        if saved.meta["params_digest"] != digest:
            raise DamagedCheckpoint(f"{path} does not hold the parameters that {what} was saved against")
        return saved

    def _matching_base(self, like: dict[str, Any], expected: dict[str, str], trained: dict[str, Any]) -> str | None:
        """The digest of the base, if it is intact and has the `expected` digests once patched by `trained`.

        like: {path: array}, whose shardings the base gets while it is compared.
        """
        slices: dict[str, dict[str, Any]] = {}
        for path, leaf in trained.items():
            slices.setdefault(canonical_path(path), {})[path] = leaf
        try:
            self._base.wait()
            saved = agreement.all_or_none(partial(self._base.saved, 0), UserError)
            check_slices("the trained parameters", trained, saved_shapes(saved.meta, "params"))
            for base in saved.verified_params(like):
                own = {path: leaf for each in base for path, leaf in slices.get(each, {}).items()}
                if digests_of(patch(base, own)) != {path: expected[path] for path in base}:
                    return None
        except UserError:
            return None
        return saved.meta["params_digest"]

    def _bases(self) -> dict[int, str]:
        """{step: digest of its base} of the delta checkpoints that are not known to be damaged."""
        bases = {}
        for step in self.steps():
            with suppress(DamagedCheckpoint):
                bases[step] = self.meta(step).get(BASE)
        return {step: base for step, base in bases.items() if base and step not in self._steps.damaged}

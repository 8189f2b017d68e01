"""A directory of Orbax checkpoints: asynchronous saves that are never lost, restores that are never silently wrong.

A checkpoint is a directory DIR/<step> with three parts: `params` (a nested dict), `opt` (the leaves of an optax state
by path) and `meta` (JSON). `meta` holds a SHA-256 of every leaf and of itself, because Orbax loads a data file with
overwritten bytes without an error. Orbax writes into DIR/<step>.orbax-checkpoint-tmp and then renames it to DIR/<step>.
Orbax may also rename a save without all of its files, so a save counts only after a look at them.
"""

import contextlib
import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from llm3.checkpoints import retention
from llm3.checkpoints.async_save import AsyncSave, Deadlock
from llm3.checkpoints.layout import LiteralPath, missing_files, orbax_context
from llm3.checkpoints.metadata import (
    array_mismatches,
    as_arrays,
    by_path,
    check_shapes,
    digests_of,
    json_digest,
    not_finite,
    saved_shapes,
    with_digests,
)
from llm3.distributed.interrupts import unfinished_saves
from llm3.errors import NotWritten, UserError, listed, nearest, os_reason, root_cause, writing
from llm3.tree import flatten, unflatten

logger = logging.getLogger(__name__)


class DamagedCheckpoint(UserError):
    """A finished checkpoint that cannot be read, or whose content does not match its digests."""


class Store:
    """The checkpoints in `directory`, each of them self-contained.

    Saves are asynchronous in a `with` block, which waits for the last one at its end, however it ends. Elsewhere a save
    is finished when `save` returns: Python offers no public hook that could finish it at exit.

    keep: the number of latest steps to keep. best: the name of a metric; the step where it is lowest is kept too.
    read_only: never creates, moves or deletes anything. Raises UserError for keep < 1.
    """

    def __init__(self, directory: Path, *, keep: int = 2, best: str | None = None, read_only: bool = False):
        if keep < 1:
            raise UserError(f"keep={keep}: expected at least 1 checkpoint")
        self.directory = Path(directory).absolute()
        self._keep, self._best, self._read_only = keep, best, read_only
        self._writer: ocp.training.Checkpointer | None = None
        self._save_in_progress: AsyncSave | None = None
        self._entered = 0  # the number of `with` blocks
        self.damaged: set[int] = set()  # the steps that the next save renames

    def __enter__(self) -> "Store":
        self._entered += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._entered -= 1
        self.close()

    def save(self, step: int, params: dict, opt: Any, meta: dict, metrics: Mapping[str, float] | None = None) -> None:
        """Save, in a `with` block in the background; the caller may donate or change its arrays once this returns.

        params: nested dict of arrays. opt: any pytree of arrays. meta: JSON-able; gains `digests`, `params_digest`,
        `opt_digests`, `shapes`, `meta_digest`. metrics: {name: value}, to choose the best step.

        Raises UserError for a leaf that is not finite, a step that is not above the latest one, or metrics that lack
        `best`. Raises NotWritten if the disk refuses this save or the previous one. After an error nothing new is
        saved, and earlier checkpoints are intact.
        """
        self._check_writable()
        self.wait()
        self._rename_damaged()
        if (latest := self.latest()) is not None and step <= latest:
            raise UserError(f"cannot save step {step}: {self.directory} already holds step {latest}")
        if metrics is not None and self._best and self._best not in metrics:
            raise UserError(f"the best checkpoint is chosen by {self._best!r}: {nearest(self._best, metrics)}")
        parts = {"params": as_arrays(flatten(params)), "opt": as_arrays(by_path(opt))}
        for name, leaves in parts.items():
            if wrong := not_finite(leaves):
                raise UserError(f"step {step} is not saved: {name} has non-finite values in {listed(wrong)}")
        meta = with_digests(meta, parts)
        arrays = [name for name, leaves in parts.items() if leaves]  # Orbax refuses an empty tree
        started = AsyncSave(step, arrays)
        with self._saving(step):
            started.response = self._open().save_checkpointables_async(
                step,
                {name: unflatten(parts[name]) for name in arrays} | {"meta": meta},
                metrics=None if metrics is None else {name: float(value) for name, value in metrics.items()},
            )
        self._save_in_progress = started
        unfinished_saves.add(started)
        if not self._entered:
            self.wait()

    def wait(self) -> None:
        """Return when the last save is finished and all its files are there.

        Raises NotWritten if the disk refused it or a file is missing, else RuntimeError.
        """
        if self._save_in_progress is None:
            return
        started, self._save_in_progress = self._save_in_progress, None
        with self._saving(started.step):
            started.wait()
        self._check_complete(started)
        self._delete_old()

    def _check_complete(self, save: AsyncSave) -> None:
        path = self.directory / str(save.step)
        if jax.process_index() == 0 and (missing := missing_files(path, save.arrays)):
            kept = f"; it is kept as {self._rename(save.step).name}" if path.exists() else ""
            where = f"{self.directory}: the checkpoint of step {save.step} was not written"
            raise NotWritten(f"{where}: it lacks {listed(missing)}{kept}")

    def _delete_old(self) -> None:
        """Delete the checkpoints that are not kept. Only the first process does it; the others only read the latest."""
        if jax.process_index() == 0 and self._writer is not None:
            steps = self.steps()
            metrics = {each.step: each.metrics for each in self._writer.checkpoints if each.metrics is not None}
            for step in sorted({*steps} - retention.kept(steps, self._keep, metrics, self._best)):
                retention.delete(self.directory / str(step))

    def close(self) -> None:
        """Wait for the last save and close the Orbax checkpointer. Raises as `wait` does."""
        self.wait()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def steps(self) -> list[int]:
        """The steps of the finished checkpoints, ascending."""
        try:
            entries = list(self.directory.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(int(each.name) for each in entries if each.name.isdecimal() and each.is_dir())

    def latest(self) -> int | None:
        """The highest step, regardless of file times."""
        return max(self.steps(), default=None)

    def meta(self, step: int) -> dict:
        """The metadata of a step. Raises UserError if there is no such step, DamagedCheckpoint if it is damaged."""
        if step not in (steps := self.steps()):
            raise UserError(f"{self.directory} has no step {step}; it has {listed(map(str, steps)) or 'none'}")
        meta = self._read(step, "meta", None)
        digest = meta.pop("meta_digest", None) if isinstance(meta, dict) else None
        if digest is None or digest != json_digest(meta):
            raise DamagedCheckpoint(f"{self.directory / str(step) / 'meta'} does not match its digest")
        return meta

    def load_params(self, step: int, abstract: dict | None = None) -> dict:
        """The parameters of a step, each leaf checked against its digest before any cast.

        abstract: nested dict of jax.ShapeDtypeStruct with the dtype and sharding of the result (no sharding: first
        device); None: numpy arrays as saved. Raises UserError where paths or shapes differ, DamagedCheckpoint.
        """
        return unflatten(self._load(step, "params", None if abstract is None else flatten(abstract)))

    def load_opt(self, step: int, abstract: Any) -> Any:
        """The optimizer state of a step in the structure of `abstract`, otherwise as `load_params`."""
        loaded = self._load(step, "opt", by_path(abstract))
        return jax.tree.unflatten(jax.tree.structure(abstract), [loaded[path] for path in by_path(abstract)])

    def remove(self, step: int) -> None:
        """Delete a step. Raises NotWritten where the disk refuses."""
        self._check_writable()
        if jax.process_index() == 0:
            retention.delete(self.directory / str(step))
        self._changed("a checkpoint is deleted")

    def _check_writable(self) -> None:
        if self._read_only:
            raise RuntimeError(f"{self.directory} was opened read-only")

    @contextlib.contextmanager
    def _saving(self, step: int) -> Iterator[None]:
        """Turn any error into one that names the lost checkpoint, and remove its unfinished files."""
        try:
            yield
        except Exception as error:
            writer, self._writer = self._writer, None  # Orbax would raise the same error at every later call
            if writer and not isinstance(error, Deadlock):  # closing would wait for the same thread
                with contextlib.suppress(Exception):
                    writer.close()
            self._remove_unfinished(step)
            where = f"{self.directory}: the checkpoint of step {step} was not written"
            if why := os_reason(error):
                raise NotWritten(f"{where}: {why}") from error
            raise RuntimeError(f"{where}: {root_cause(error)}") from error

    def _remove_unfinished(self, step: int) -> None:
        """Free the space of a failed save. Best effort: Orbax threads may still write for a while."""
        for _ in range(10 if jax.process_index() == 0 else 0):
            for each in self.directory.glob(f"{step}.orbax-checkpoint-tmp*"):
                shutil.rmtree(each, ignore_errors=True)
            time.sleep(0.05)

    def _open(self) -> ocp.training.Checkpointer:
        if self._writer is None:
            self._writer = ocp.training.Checkpointer(
                LiteralPath(self.directory),
                context=orbax_context(),
                save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
                preservation_policy=ocp.training.preservation_policies.PreserveAll(),  # see `retention`
                cleanup_tmp_directories=True,
            )
        return self._writer

    def _rename_damaged(self) -> None:
        """Rename the damaged steps: they will be saved again, and must not count towards `keep`."""
        for step in sorted(self.damaged):
            path = self.directory / str(step)
            if path.exists():  # else someone removed it meanwhile
                logger.warning("the damaged checkpoint %s is kept as %s", path, self._rename(step).name)
        if self.damaged:
            self._changed("damaged checkpoints are renamed")
        self.damaged.clear()

    def _rename(self, step: int) -> Path:
        """Rename a step to the returned path, which is no checkpoint; only the first process does it."""
        path = self.directory / str(step)
        names = (path.with_name(f"{step}.damaged{suffix}") for suffix in ("", *(f"-{n}" for n in range(2, 100))))
        target = next(name for name in names if not name.exists())
        if jax.process_index() == 0:
            with writing(target):
                path.rename(target)
        return target

    def _changed(self, what: str) -> None:
        """Let all processes and Orbax see the changed directory. what: the name of the change, for the barrier."""
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(what)
        if self._writer is not None:
            self._writer.reload()

    def _read(self, step: int, part: str, target: Any, saved: dict[str, tuple] | None = None) -> Any:
        """A part as Orbax reads it. saved: the required shapes and dtypes, checked since Orbax would silently cast."""
        path = LiteralPath(self.directory / str(step))
        try:
            with orbax_context():
                if saved is not None:
                    arrays = ocp.checkpointables_metadata(path).metadata.get(part)  # None if Orbax does not know
                    if arrays is not None and (wrong := array_mismatches(flatten(arrays), saved)):
                        raise DamagedCheckpoint(f"{path / part}: {listed(wrong)}")
                return ocp.load_checkpointables(path, {part: target})[part]
        except (MemoryError, jax.errors.JaxRuntimeError, DamagedCheckpoint):
            raise  # the first two are faults of the machine, not of the file
        except Exception as error:
            if not path.is_dir():
                raise DamagedCheckpoint(f"{path} is gone: something removed it while it was being read") from error
            raise DamagedCheckpoint(f"{path / part} cannot be read: {root_cause(error)}") from error

    def _load(self, step: int, part: str, abstract: dict[str, Any] | None) -> dict[str, Any]:
        meta = self.meta(step)
        saved = saved_shapes(meta, part)
        if abstract is None:
            target = {path: np.empty(shape, dtype) for path, (shape, dtype) in saved.items()}
        else:
            check_shapes(f"{self.directory / str(step) / part}", abstract, saved)
            target = {path: _target(leaf, saved[path][1]) for path, leaf in abstract.items()}
        loaded = flatten(self._read(step, part, unflatten(target), saved)) if target else {}
        expected = meta["digests" if part == "params" else "opt_digests"]
        found = digests_of(loaded)
        if wrong := [path for path in expected if found.get(path) != expected[path]]:
            raise DamagedCheckpoint(f"{self.directory / str(step) / part}: {listed(wrong)} does not match its digest")
        if abstract is None:
            return loaded
        return {path: loaded[path].astype(leaf.dtype, copy=False) for path, leaf in abstract.items()}


def _target(leaf: Any, dtype: np.dtype) -> Any:
    """The target passed to Orbax: the saved dtype, so that digests can be compared, and the sharding of `leaf`."""
    if isinstance(leaf, np.ndarray):
        return np.empty(leaf.shape, dtype)
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)

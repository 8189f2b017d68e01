"""A directory of Orbax checkpoints: asynchronous saves that are never lost, restores that are never silently wrong.

A checkpoint is a directory DIR/<step> with three parts: `params` (a nested dict), `opt` (the leaves of an optax state
by path) and `meta` (JSON). `meta` holds a digest of every leaf and of itself, because Orbax loads a data file with
overwritten bytes without an error. Orbax writes into DIR/<step>.orbax-checkpoint-tmp and then renames it to DIR/<step>;
where folders cannot be renamed, see `commit.py`. Orbax may also commit a save without all of its files, so a save
counts only after a look at them.
"""

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from llm3 import remote
from llm3.checkpoints import commit, retention
from llm3.checkpoints.async_save import AsyncSave, Deadlock
from llm3.checkpoints.layout import concurrent_bytes, for_orbax, missing_files, orbax_context
from llm3.checkpoints.metadata import as_arrays, by_path, not_finite, with_digests
from llm3.checkpoints.saved_step import DamagedCheckpoint, SavedStep
from llm3.distributed import processes
from llm3.distributed.interrupts import unfinished_saves
from llm3.errors import NotWritten, UserError, listed, nearest, os_reason, root_cause
from llm3.tree import flatten, unflatten

__all__ = ["DamagedCheckpoint", "Store"]

logger = logging.getLogger(__name__)


class Store:
    """The checkpoints in `directory`, each of them self-contained.

    Saves are asynchronous in a `with` block, which waits for the last one at its end, however it ends. Elsewhere a save
    is finished when `save` returns: Python offers no public hook that could finish it at exit.

    keep: the number of latest steps to keep. best: the name of a metric; the step where it is lowest is kept too.
    every: steps that are a multiple of it are kept too; 0: none. read_only: never creates, moves or deletes anything.
    Raises UserError for keep < 1.
    """

    def __init__(
        self, directory: Path, *, keep: int = 2, best: str | None = None, every: int = 0, read_only: bool = False
    ):
        if keep < 1:
            raise UserError(f"keep={keep}: expected at least 1 checkpoint")
        self.directory = commit.located(Path(directory))
        self._named = Path(directory)  # where the rest of llm3 looks for the folder
        self._keep, self._best, self._every, self._read_only = keep, best, every, read_only
        self._writer: ocp.training.Checkpointer | None = None
        self._limit: int | None = None
        self._by_file: bool | None = None  # see `commit.py`; set by the first save
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
        if self._by_file is None:
            self._by_file = processes.broadcast_from_first(lambda: commit.prepare(self.directory))
            if self._by_file:
                self._named.mkdir(parents=True, exist_ok=True)
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
        if jax.process_index() == 0:
            remote.push()  # what a run that resumes from this step needs besides
        started = AsyncSave(step, arrays)
        with self._saving(step):
            started.response = self._open(concurrent_bytes(parts.values())).save_checkpointables_async(
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
            for step in sorted({*steps} - retention.kept(steps, self._keep, metrics, self._best, self._every)):
                commit.delete(self.directory / str(step))

    def close(self) -> None:
        """Wait for the last save and close the Orbax checkpointer. Raises as `wait` does."""
        self.wait()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def steps(self) -> list[int]:
        """The steps of the finished checkpoints, ascending."""
        return commit.saved_steps(self.directory)

    def latest(self) -> int | None:
        """The highest step, regardless of file times."""
        return max(self.steps(), default=None)

    def saved(self, step: int) -> SavedStep:
        """A step, to read from. Raises UserError if there is none, DamagedCheckpoint if its metadata is damaged."""
        if step not in (steps := self.steps()):
            raise UserError(f"{self.directory} has no step {step}; it has {listed(map(str, steps)) or 'none'}")
        return SavedStep(self.directory / str(step))

    def meta(self, step: int) -> dict:
        """The metadata of a step. Raises UserError if there is no such step, DamagedCheckpoint if it is damaged."""
        return self.saved(step).meta

    def load_params(self, step: int, abstract: dict | None = None) -> dict:
        """The parameters of a step, each leaf checked against its digest before any cast.

        abstract: nested dict of jax.ShapeDtypeStruct with the dtype and sharding of the result (no sharding: first
        device); None: numpy arrays as saved. Raises UserError where paths or shapes differ, DamagedCheckpoint.
        """
        return self.saved(step).load_params(abstract)

    def load_opt(self, step: int, abstract: Any) -> Any:
        """The optimizer state of a step in the structure of `abstract`, otherwise as `load_params`."""
        return self.saved(step).load_opt(abstract)

    def remove(self, step: int) -> None:
        """Delete a step. Raises NotWritten where the disk refuses."""
        self._check_writable()
        if jax.process_index() == 0:
            commit.delete(self.directory / str(step))
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
            unfinished = list(self.directory.glob(f"{step}.orbax-checkpoint-tmp*"))
            if self._by_file and step not in self.steps():
                unfinished.append(self.directory / str(step))
            for each in unfinished:
                commit.remove_tree(each)
            time.sleep(0.05)

    def _open(self, limit: int | None = None) -> ocp.training.Checkpointer:
        """The writer of Orbax, which compresses `limit` bytes at once."""
        if self._writer is not None and limit != self._limit:
            self._writer.close()
            self._writer = None
        if self._writer is None:
            self._limit = limit
            self._writer = ocp.training.Checkpointer(
                for_orbax(self.directory),
                context=orbax_context(limit, by_file=bool(self._by_file)),
                save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
                preservation_policy=ocp.training.preservation_policies.PreserveAll(),  # see `retention`
                cleanup_tmp_directories=not self._by_file,  # Orbax would remove what was set aside, too
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
        target = commit.set_aside(path)
        if jax.process_index() == 0:
            commit.rename(path, target)
        return target

    def _changed(self, what: str) -> None:
        """Let all processes and Orbax see the changed directory. what: the name of the change, for the barrier."""
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(what)
        if self._writer is not None:
            self._writer.reload()

"""A directory of checkpoints on Orbax: asynchronous saves that are never lost, restores that are never silently wrong.

A checkpoint is a directory DIR/<step> with three parts: `params` (a nested dict), `opt` (the leaves of an optax state
under their paths) and `meta` (JSON). `meta` holds a SHA-256 of every leaf and of itself, for Orbax loads a data file
with overwritten bytes without a word. Orbax writes into DIR/<step>.orbax-checkpoint-tmp and renames, so that DIR/<step>
is always a finished save.
"""

import contextlib
import functools
import logging
import math
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from llm3.checkpoints.async_save import Pending, Stuck
from llm3.checkpoints.metadata import (
    as_arrays,
    by_path,
    check_shapes,
    digests_of,
    json_digest,
    not_finite,
    other_arrays,
    saved_shapes,
    sealed,
)
from llm3.errors import NotWritten, UserError, cause, listed, nearest, refused, writing
from llm3.tree import flatten, unflatten

logger = logging.getLogger(__name__)


class DamagedCheckpoint(UserError):
    """A finished checkpoint that cannot be read, or holds other bytes than were saved."""


class Store:
    """The checkpoints in `directory`, each complete in itself.

    keep: how many of the latest steps stay. best: the name of a metric; the step where it is lowest stays as well.
    read_only: never creates, moves or deletes anything. Raises UserError for keep < 1.
    """

    def __init__(self, directory: Path, *, keep: int = 2, best: str | None = None, read_only: bool = False):
        if keep < 1:
            raise UserError(f"keep={keep}: expected at least 1 checkpoint")
        self.directory = Path(directory).absolute()
        self._keep, self._best, self._read_only = keep, best, read_only
        self._writer: ocp.training.Checkpointer | None = None
        self._pending: Pending | None = None  # what is being saved
        self.damaged: set[int] = set()  # steps that the next save renames

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def save(self, step: int, params: dict, opt: Any, meta: dict, metrics: Mapping[str, float] | None = None) -> None:
        """Save in the background; the caller may donate or change its arrays as soon as this returns.

        params: nested dict of arrays. opt: any pytree of arrays. meta: JSON-able; gains `digests`, `params_digest`,
        `opt_digests`, `shapes`, `meta_digest`. metrics: by name, for `best`.

        Raises UserError for a leaf that is not finite, a step that is not above the latest one, and metrics without
        `best`; NotWritten where the disk refuses, also what the previous save wrote in the background. Nothing is
        saved then, and what was saved before is whole.
        """
        self._check_writable()
        self.wait()
        self._set_aside_damaged()
        if (latest := self.latest()) is not None and step <= latest:
            raise UserError(f"cannot save step {step}: {self.directory} already holds step {latest}")
        if metrics is not None and self._best and self._best not in metrics:
            raise UserError(f"the best checkpoint is chosen by {self._best!r}: {nearest(self._best, metrics)}")
        parts = {"params": as_arrays(flatten(params)), "opt": as_arrays(by_path(opt))}
        for name, leaves in parts.items():
            if wrong := not_finite(leaves):
                raise UserError(f"step {step} is not saved: {name} has values that are not finite in {listed(wrong)}")
        meta = sealed(meta, parts)
        pending = Pending(step)
        with self._saving(step):
            pending.response = self._open().save_checkpointables_async(
                step,
                # Orbax refuses an empty tree
                {name: unflatten(leaves) for name, leaves in parts.items() if leaves} | {"meta": meta},
                metrics=None if metrics is None else {name: float(value) for name, value in metrics.items()},
            )
        self._pending = pending
        if _register_at_exit is None:
            self.wait()

    def wait(self) -> None:
        """Return when the last save is finished. Raises NotWritten if the disk refused it, else RuntimeError."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        with self._saving(pending.step):
            pending.wait()

    def close(self) -> None:
        """Wait for the last save and release what Orbax holds. Raises as `wait` does."""
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
        """The highest step, whichever file is the newest."""
        return max(self.steps(), default=None)

    def meta(self, step: int) -> dict:
        """The metadata of a step. Raises UserError where there is no such step, and DamagedCheckpoint."""
        if step not in (steps := self.steps()):
            raise UserError(f"{self.directory} has no step {step}; it has {listed(map(str, steps)) or 'none'}")
        meta = self._read(step, "meta", None)
        seal = meta.pop("meta_digest", None) if isinstance(meta, dict) else None
        if seal is None or seal != json_digest(meta):
            raise DamagedCheckpoint(f"{self.directory / str(step) / 'meta'} does not match its digest")
        return meta

    def load_params(self, step: int, abstract: dict | None = None) -> dict:
        """The parameters of a step, each leaf checked against its digest before any cast.

        abstract: nested dict of jax.ShapeDtypeStruct, whose dtype and sharding (None: the first device) the result has;
        None: numpy arrays as saved. Raises UserError where paths or shapes differ, DamagedCheckpoint.
        """
        return unflatten(self._load(step, "params", None if abstract is None else flatten(abstract)))

    def load_opt(self, step: int, abstract: Any) -> Any:
        """The optimizer state of a step in the structure of `abstract`; the rest as in `load_params`."""
        loaded = self._load(step, "opt", by_path(abstract))
        return jax.tree.unflatten(jax.tree.structure(abstract), [loaded[path] for path in by_path(abstract)])

    def remove(self, step: int) -> None:
        """Delete a step. Raises NotWritten where the disk refuses."""
        self._check_writable()
        if jax.process_index() == 0:
            with writing(self.directory):
                shutil.rmtree(self.directory / str(step))
        self._changed("a checkpoint is deleted")

    def _check_writable(self) -> None:
        if self._read_only:
            raise RuntimeError(f"{self.directory} was opened read-only")

    @contextlib.contextmanager
    def _saving(self, step: int) -> Iterator[None]:
        """Say what was not saved, and leave nothing of it."""
        try:
            yield
        except Exception as error:
            writer, self._writer = self._writer, None  # Orbax would raise the same error at every later call
            if not isinstance(error, Stuck):  # else it would wait as well
                with contextlib.suppress(Exception):
                    writer.close()
            self._remove_unfinished(step)
            where = f"{self.directory}: the checkpoint of step {step} was not written"
            if why := refused(error):
                raise NotWritten(f"{where}: {why}") from error
            raise RuntimeError(f"{where}: {cause(error)}") from error

    def _remove_unfinished(self, step: int) -> None:
        """Give back the space that a failed save takes: as a rule, for threads of Orbax may write for a while yet."""
        for _ in range(10 if jax.process_index() == 0 else 0):
            for each in self.directory.glob(f"{step}.orbax-checkpoint-tmp*"):
                shutil.rmtree(each, ignore_errors=True)
            time.sleep(0.05)

    def _open(self) -> ocp.training.Checkpointer:
        if self._writer is None:
            policies = ocp.training.preservation_policies
            kept = [policies.LatestN(self._keep)]
            if self._best:
                rank = functools.partial(_rank, self._best)
                kept.append(
                    policies.BestN(get_metric_fn=rank, reverse=True, n=1, keep_checkpoints_without_metrics=False)
                )
            self._writer = ocp.training.Checkpointer(
                self.directory,
                context=_context(),
                save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
                preservation_policy=policies.AnyPreservationPolicy(kept),
                cleanup_tmp_directories=True,
            )
            if _register_at_exit is not None:
                _register_at_exit(_finish_at_exit, self)
        return self._writer

    def _set_aside_damaged(self) -> None:
        """Rename the damaged steps: they will be saved again, and must not count among the kept ones."""
        for step in sorted(self.damaged):
            path = self.directory / str(step)
            if not path.exists():  # something else has removed it meanwhile
                continue
            names = (path.with_name(f"{step}.damaged{suffix}") for suffix in ("", *(f"-{n}" for n in range(2, 100))))
            target = next(name for name in names if not name.exists())
            if jax.process_index() == 0:
                with writing(target):
                    path.rename(target)
            logger.warning("the damaged checkpoint %s is kept as %s", path, target.name)
        if self.damaged:
            self._changed("damaged checkpoints are set aside")
        self.damaged.clear()

    def _changed(self, what: str) -> None:
        """Let all processes, and Orbax, see what has changed in the directory."""
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(what)
        if self._writer is not None:
            self._writer.reload()

    def _read(self, step: int, part: str, target: Any, saved: dict[str, tuple] | None = None) -> Any:
        """A part as Orbax reads it; `saved`: the shapes and dtypes that its arrays must have, for Orbax would cast."""
        path = self.directory / str(step)
        try:
            with _context():
                if saved is not None:
                    arrays = ocp.checkpointables_metadata(path).metadata.get(part)  # None where Orbax cannot tell
                    if arrays is not None and (wrong := other_arrays(flatten(arrays), saved)):
                        raise DamagedCheckpoint(f"{path / part}: {listed(wrong)}")
                return ocp.load_checkpointables(path, {part: target})[part]
        except (MemoryError, jax.errors.JaxRuntimeError, DamagedCheckpoint):
            raise  # the first two are the machine's fault
        except Exception as error:
            if not path.is_dir():
                raise DamagedCheckpoint(f"{path} is gone: something removed it while it was being read") from error
            raise DamagedCheckpoint(f"{path / part} cannot be read: {cause(error)}") from error

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


# The public `atexit` runs after concurrent.futures has shut down, and Orbax cannot finish a save then. Where Python has
# no earlier hook, saves are awaited at once.
_register_at_exit = getattr(threading, "_register_atexit", None)


def _finish_at_exit(store: Store) -> None:
    try:
        store.close()
    except Exception as error:
        logger.error("the last checkpoint was lost: %s", error, exc_info=not isinstance(error, NotWritten))


def _context() -> ocp.Context:
    context = ocp.Context()
    context.async_options.create_directories_asynchronously = False  # else all wait for minutes for one that failed
    context.checkpointables.registry = ocp.handlers.local_registry().add(
        ocp.handlers.JsonHandler, checkpointable_name="meta"
    )
    return context


def _rank(name: str, metrics: Mapping[str, float]) -> float:
    value = metrics.get(name, math.inf)
    return math.inf if math.isnan(value) else value


def _target(leaf: Any, dtype: np.dtype) -> Any:
    """What Orbax is asked for: the saved dtype, so that digests can be compared, in the sharding of `leaf`."""
    if isinstance(leaf, np.ndarray):
        return np.empty(leaf.shape, dtype)
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)

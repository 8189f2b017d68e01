"""Reads one finished checkpoint: its metadata, and its arrays, each checked against the metadata."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from llm3.checkpoints.damage import in_words, passes, patiently, quiet_asyncio
from llm3.checkpoints.layout import OF_JSON, LiteralPath, align_operations, orbax_context
from llm3.checkpoints.metadata import array_mismatches, by_path, check_shapes, digests_of, json_digest, saved_shapes
from llm3.distributed import agreement
from llm3.errors import Unreachable, UserError, cause_chain, listed
from llm3.files import check_format
from llm3.tree import flatten, unflatten


class DamagedCheckpoint(UserError):
    """A finished checkpoint that cannot be read, or whose content does not match its digests."""


class SavedStep:
    """The checkpoint in the directory `path`, and its metadata, `meta`. Raises DamagedCheckpoint, Unreachable.

    What is the same for each of its parts is read once. All processes load it together; what one of them finds damaged
    is damaged for all.
    """

    def __init__(self, path: Path):
        self._path = LiteralPath(path)
        self.meta = self._read_meta()

    def load_params(self, abstract: dict | None = None) -> dict:
        """The parameters, as `Store.load_params`."""
        return unflatten(self._load("params", None if abstract is None else flatten(abstract)))

    def load_opt(self, abstract: Any) -> Any:
        """The optimizer state, as `Store.load_opt`."""
        loaded = self._load("opt", by_path(abstract))
        return jax.tree.unflatten(jax.tree.structure(abstract), [loaded[path] for path in by_path(abstract)])

    def _read_meta(self) -> dict:
        try:
            # Orbax would look through the whole checkpoint first
            file = self._path / "meta" / OF_JSON[0]
            meta = json.loads(patiently(lambda: file.read_text(encoding="utf-8")))
        except MemoryError:
            raise
        except Exception as error:
            raise self._unreadable("meta", error) from error
        digest = meta.pop("meta_digest", None) if isinstance(meta, dict) else None
        if digest is None or digest != json_digest(meta):
            raise DamagedCheckpoint(f"{self._path / 'meta'} does not match its digest")
        check_format(meta, Path(self._path / "meta"))
        return meta

    @functools.cached_property
    def _arrays(self) -> dict[str, Any]:
        """{part: its arrays on disk, as Orbax describes them; None if it does not know}"""
        return ocp.checkpointables_metadata(self._path).metadata

    def _read(self, part: str, target: Any, saved: dict[str, tuple]) -> Any:
        """A part as Orbax reads it. saved: the required shapes and dtypes, checked since Orbax would silently cast."""
        quiet_asyncio()
        try:
            with orbax_context(reads=True):
                arrays = self._arrays.get(part)
                if arrays is not None and (wrong := array_mismatches(flatten(arrays), saved)):
                    raise DamagedCheckpoint(f"{self._path / part}: {listed(wrong)}")
                return patiently(lambda: ocp.load_checkpointables(self._path, {part: target})[part])
        except (MemoryError, jax.errors.JaxRuntimeError, DamagedCheckpoint):
            raise  # the first two are faults of the machine, not of the file
        except Exception as error:
            raise self._unreadable(part, error) from error

    def _unreadable(self, part: str, error: Exception) -> UserError:
        if passes(error):
            why = f"{cause_chain(error)[0]}, though it may be intact: rerun the command"
            return Unreachable(f"{self._path / part} cannot be read now: {why}")
        if not self._path.is_dir():
            return DamagedCheckpoint(f"{self._path} is gone: something removed it while it was being read")
        return DamagedCheckpoint(f"{self._path / part} cannot be read: {in_words(Path(self._path), part, error)}")

    def _load(self, part: str, abstract: dict[str, Any] | None) -> dict[str, Any]:
        saved = saved_shapes(self.meta, part)
        if abstract is None:
            target = {path: np.empty(shape, dtype) for path, (shape, dtype) in saved.items()}
        else:
            check_shapes(f"{self._path / part}", abstract, saved)
            target = {path: _target(leaf, saved[path][1]) for path, leaf in abstract.items()}
        try:
            loaded = agreement.all_or_none(lambda: self._arrays_of(part, target, saved), DamagedCheckpoint)
        except DamagedCheckpoint:
            align_operations()
            raise
        align_operations()
        found = digests_of(loaded)  # of whole leaves, for which all processes are needed
        agreement.all_or_none(lambda: self._check_digests(part, found), DamagedCheckpoint)
        if abstract is None:
            return loaded
        return {path: loaded[path].astype(leaf.dtype, copy=False) for path, leaf in abstract.items()}

    def _arrays_of(self, part: str, target: dict[str, Any], saved: dict[str, tuple]) -> dict[str, Any]:
        return flatten(self._read(part, unflatten(target), saved)) if target else {}

    def _check_digests(self, part: str, found: dict[str, str]) -> None:
        expected = self.meta["digests" if part == "params" else "opt_digests"]
        if wrong := [path for path in expected if found.get(path) != expected[path]]:
            raise DamagedCheckpoint(f"{self._path / part}: {listed(wrong)} does not match its digest")


def _target(leaf: Any, dtype: np.dtype) -> Any:
    """The target passed to Orbax: the saved dtype, so that digests can be compared, and the sharding of `leaf`."""
    if isinstance(leaf, np.ndarray):
        return np.empty(leaf.shape, dtype)
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)

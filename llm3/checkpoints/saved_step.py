"""Reads one finished checkpoint: its metadata, and its arrays, each checked against the metadata."""

import functools
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from llm3.checkpoints.damage import in_words, passes, patiently, quiet_asyncio
from llm3.checkpoints.digests import DIGEST_FORMAT, digests_of
from llm3.checkpoints.layout import LEAST_SHARED_BYTES, OF_JSON, align_operations, for_orbax, reading_context
from llm3.checkpoints.metadata import array_mismatches, by_path, check_shapes, json_digest, saved_shapes
from llm3.distributed import agreement
from llm3.distributed.sharding import over_all_devices
from llm3.errors import Unreachable, UserError, cause_chain, listed
from llm3.files import check_format
from llm3.tree import flatten, unflatten

LEAST_GROUP_BYTES = 2**26  # of the leaves that are read together, where one leaf has less


class DamagedCheckpoint(UserError):
    """A finished checkpoint that cannot be read, or whose content does not match its digests."""


class SavedStep:
    """The checkpoint in the directory `path`, and its metadata, `meta`. Raises DamagedCheckpoint, Unreachable.

    What is the same for each of its parts is read once. All processes load it together; what one of them finds damaged
    is damaged for all.
    """

    def __init__(self, path: Path):
        self._path = for_orbax(path)
        self.meta = self._read_meta()

    def load_params(self, abstract: dict | None = None, *, some: bool = False) -> dict:
        """The parameters, as `Store.load_params`. some: whether `abstract` may lack leaves, which are then not read."""
        return unflatten(self._load("params", None if abstract is None else flatten(abstract), some))

    def load_opt(self, abstract: Any) -> Any:
        """The optimizer state, as `Store.load_opt`."""
        loaded = self._load("opt", by_path(abstract))
        return jax.tree.unflatten(jax.tree.structure(abstract), [loaded[path] for path in by_path(abstract)])

    def verified_params(self, like: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        """All parameters, {path: leaf}, some at a time, each checked against its digest.

        like: arrays whose shardings the leaves get; None: spread over all devices, or on the host if small.
        """
        saved = saved_shapes(self.meta, "params")
        if like is None:
            target = agreement.all_or_none(self._spread_params, DamagedCheckpoint)
        else:
            check_shapes(f"{self._path / 'params'}", dict(like), saved)
            target = {path: _target(leaf, saved[path][1]) for path, leaf in like.items()}
        for paths in _groups({path: math.prod(shape) * dtype.itemsize for path, (shape, dtype) in saved.items()}):
            leaves = self._verified("params", {path: target[path] for path in paths})
            yield leaves
            leaves.clear()  # before the next ones are read

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
        check_format(meta, self._path / "meta")
        if (format := meta.get("digest_format", 1)) > DIGEST_FORMAT:
            raise UserError(f"{self._path} was saved by a newer llm3 (digests of format {format}): update llm3")
        return meta

    @functools.cached_property
    def _arrays(self) -> dict[str, Any]:
        """{part: its arrays on disk, as Orbax describes them; None if it does not know}"""
        return ocp.checkpointables_metadata(self._path).metadata

    def _read(self, part: str, target: dict[str, Any]) -> dict[str, Any]:
        """Some leaves of a part as Orbax reads them."""
        with self._explained(part):
            arrays = self._arrays.get(part)  # compared, since Orbax would silently cast
            if arrays is not None and (wrong := array_mismatches(flatten(arrays), saved_shapes(self.meta, part))):
                raise DamagedCheckpoint(f"{self._path / part}: {listed(wrong)}")
            return flatten(patiently(lambda: ocp.load_checkpointables(self._path, {part: unflatten(target)})[part]))

    def _spread_params(self) -> dict[str, Any]:
        """Targets for all parameters, spread over all devices."""
        with self._explained("params"):
            stored = flatten(self._arrays.get("params") or {})
        return {path: _spread(*each, stored.get(path)) for path, each in saved_shapes(self.meta, "params").items()}

    @contextmanager
    def _explained(self, part: str) -> Iterator[None]:
        """Read with Orbax, and turn any error into DamagedCheckpoint or Unreachable."""
        quiet_asyncio()
        try:
            with reading_context():
                yield
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
        return DamagedCheckpoint(f"{self._path / part} cannot be read: {in_words(self._path, part, error)}")

    def _load(self, part: str, abstract: dict[str, Any] | None, some: bool = False) -> dict[str, Any]:
        saved = saved_shapes(self.meta, part)
        if abstract is None:
            return self._verified(part, {path: np.empty(shape, dtype) for path, (shape, dtype) in saved.items()})
        saved = {path: each for path, each in saved.items() if path in abstract or not some}
        check_shapes(f"{self._path / part}", abstract, saved)
        loaded = self._verified(part, {path: _target(leaf, saved[path][1]) for path, leaf in abstract.items()})
        return {path: loaded.pop(path).astype(leaf.dtype, copy=False) for path, leaf in abstract.items()}

    def _verified(self, part: str, target: dict[str, Any]) -> dict[str, Any]:
        """Some leaves of a part in the saved dtypes, checked against their digests."""
        if not target:
            return {}
        try:
            loaded = agreement.all_or_none(lambda: self._read(part, target), DamagedCheckpoint)
        except DamagedCheckpoint:
            align_operations()
            raise
        align_operations()
        found = digests_of(loaded, self.meta.get("digest_format", 1))  # for which all processes are needed
        agreement.all_or_none(lambda: self._check_digests(part, target, found), DamagedCheckpoint)
        return loaded

    def _check_digests(self, part: str, paths: Iterable[str], found: dict[str, str]) -> None:
        expected = self.meta["digests" if part == "params" else "opt_digests"]
        if wrong := [path for path in paths if found.get(path) != expected.get(path)]:
            raise DamagedCheckpoint(f"{self._path / part}: {listed(wrong)} does not match its digest")


def _target(leaf: Any, dtype: np.dtype) -> Any:
    """The target passed to Orbax: the saved dtype, so that digests can be compared, and the sharding of `leaf`."""
    if isinstance(leaf, np.ndarray):
        return np.empty(leaf.shape, dtype)
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)


def _spread(shape: tuple[int, ...], dtype: np.dtype, stored: Any) -> Any:
    """A target that is spread over all devices, or on the host if it is small. stored: as Orbax describes the array."""
    if math.prod(shape) * dtype.itemsize <= LEAST_SHARED_BYTES:
        return np.empty(shape, dtype)
    chunk = stored.storage_metadata.chunk_shape if stored is not None and stored.storage_metadata else None
    return jax.ShapeDtypeStruct(shape, dtype, sharding=over_all_devices(shape, chunk))


def _groups(sizes: Mapping[str, int]) -> list[list[str]]:
    """The paths in groups, given the bytes of each leaf: a sixteenth of all, or LEAST_GROUP_BYTES, or one leaf."""
    groups: list[list[str]] = []
    limit, held = max(sum(sizes.values()) // 16, LEAST_GROUP_BYTES), 0
    for path, size in sizes.items():
        if not groups or held + size > limit:
            groups.append([])
            held = 0
        groups[-1].append(path)
        held += size
    return groups

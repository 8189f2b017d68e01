"""Reading the shards of a token cache as one."""

import bisect
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llm3.data.cache import shards

OPEN_FILES = 64  # files that stay mapped


class ShardReader:
    """The stored documents of all shards, in order of shards. Files are mapped when they are first read."""

    def __init__(self, directory: Path, manifest: dict[str, Any], held: BinaryIO | None = None):
        """held: the lock on the directory (see `holds.hold`), kept as long as this object."""
        self._held = held
        self._directory = directory
        self._shards, self._files = manifest["shards"], manifest["files"]
        self._dtype = np.dtype(self._shards[0]["dtype"])
        self._first_token = [0, *np.cumsum([each["tokens"] for each in self._shards]).tolist()]
        self._first_document = [0, *np.cumsum([each["documents"] for each in self._shards]).tolist()]
        self.offsets = np.asarray(np.load(directory / shards.OFFSETS, mmap_mode="r"))
        self._mapped = functools.lru_cache(OPEN_FILES)(self._map)

    def _map(self, name: str) -> np.ndarray:
        """The content of a shard's file. Raises KeyError if the shard has no such file."""
        path = self._directory / name
        if path.suffix == ".npy":
            return np.asarray(np.load(path, mmap_mode="r"))
        dtype = {shards.STREAM: self._dtype, shards.ANSWER_MASK: np.dtype(bool)}.get(path.name, np.dtype(np.uint8))
        return np.asarray(np.memmap(path, dtype, "r")) if self._files[name][1] else np.empty(0, dtype)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of all documents end to end; a read-only view if one shard holds them."""
        return self._read(shards.STREAM, start, stop, lambda size: np.zeros(size, self._dtype))

    def answer_mask(self, start: int, stop: int) -> np.ndarray:
        """bool [stop - start], True at the tokens of answers."""
        return self._read(shards.ANSWER_MASK, start, stop, lambda size: np.ones(size, bool))

    def _read(self, name: str, start: int, stop: int, absent: Callable[[int], np.ndarray]) -> np.ndarray:
        pieces: list[np.ndarray] = []
        shard = bisect.bisect_right(self._first_token, start) - 1
        while not pieces or start < stop:
            if shard == len(self._shards):  # an empty range behind the last token
                return absent(0)
            base, end = self._first_token[shard : shard + 2]
            upto = min(stop, end)
            file = f"{shards.folder(shard)}/{name}"
            values = self._mapped(file)[start - base : upto - base] if file in self._files else absent(upto - start)
            pieces.append(values)
            start, shard = upto, shard + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def note(self, document: int) -> dict[str, Any]:
        """The note of a stored document; {} if it has none."""
        shard = bisect.bisect_right(self._first_document, document) - 1
        place = document - self._first_document[shard]
        folder = shards.folder(shard)
        if f"{folder}/{shards.NOTE_ENDS}" not in self._files:
            return {}
        start, stop = self._mapped(f"{folder}/{shards.NOTE_ENDS}")[place : place + 2]
        return json.loads(self._mapped(f"{folder}/{shards.NOTES}")[start:stop].tobytes()) if start < stop else {}

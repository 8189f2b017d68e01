"""What a cache holds, and removing entries by age or size. An entry that a process reads or builds stays."""

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from llm3.data.cache import holds
from llm3.data.cache.build import MANIFEST, remove_abandoned

FILES = {"tokenizer-*.json": "tokenizer", "contamination-*.json": "overlap", "digests.json": "digests"}
UNFINISHED = "unfinished"  # the kind of tokens whose build was interrupted, or still runs


class Entry(NamedTuple):
    """A part of the cache that is removed as a whole.

    kind: tokens, unfinished, tokenizer, overlap, digests, corpus (built-in) or copy (of a data set)
    locked: the directory whose lock protects it. size: bytes. used: when it was last used, in seconds since the epoch
    source, split, folder: what it was built from, and the working directory; "": not known
    documents, tokens: None where there are none
    """

    kind: str
    path: Path
    locked: Path
    size: int
    used: float
    source: str = ""
    split: str = ""
    folder: str = ""
    documents: int | None = None
    tokens: int | None = None


class Pruned(NamedTuple):
    """The entries that were removed, or would be, and those that would be too, if they were not in use."""

    removed: list[Entry]
    in_use: list[Entry]


def entries(cache_dir: Path) -> list[Entry]:
    """The entries of a cache, the last used first."""
    found = [*_tokens(cache_dir), *_copies(cache_dir), *_files(cache_dir)]
    return sorted(found, key=lambda each: (-each.used, each.path))


def prune(cache_dir: Path, *, unused_for: float | None, most_bytes: float | None, dry_run: bool = False) -> Pruned:
    """Remove entries that were not used for `unused_for` seconds, then the least recently used above `most_bytes`.

    None: no limit. Raises OSError if an entry cannot be removed.
    """
    pruned = Pruned([], [])
    left, now = entries(cache_dir), time.time()
    size = sum(each.size for each in left)
    for each in reversed(left):
        old = unused_for is not None and now - each.used >= unused_for
        if not old and (most_bytes is None or size <= most_bytes):
            continue
        if holds.removed(each.path, each.locked, dry_run=dry_run):
            pruned.removed.append(each)
            size -= each.size
        else:
            pruned.in_use.append(each)
    if not dry_run:
        remove_abandoned(cache_dir)
        holds.remove_leftovers(cache_dir)
    return pruned


def _tokens(cache_dir: Path) -> Iterator[Entry]:
    for path in cache_dir.glob("tokens-*"):
        if not re.fullmatch(r"tokens-[0-9a-f]{16}", path.name):
            continue
        source, manifest = holds.read_source(path), _read(path / MANIFEST)
        size, used = _size_and_use(path, path.stat().st_mtime)
        name, split, folder = (str(source.get(field, "")) for field in ("source", "split", "folder"))
        documents, tokens = manifest.get("documents"), manifest.get("tokens")
        kind = "tokens" if manifest else UNFINISHED
        yield Entry(kind, path, path, size, used, name, split, folder, documents, tokens)


def _copies(cache_dir: Path) -> Iterator[Entry]:
    for path in cache_dir.glob("builtin-*-*"):
        if not path.suffix:  # else it is being written
            yield Entry("corpus", path, path, *_size_and_use(path, path.stat().st_mtime), path.name.rpartition("-")[0])
    root = cache_dir / holds.COPIES
    for path in root.iterdir() if root.is_dir() else ():
        if path.is_dir():
            yield Entry("copy", path, root, *_size_and_use(path, 0.0), path.name.replace("___", "/"))


def _files(cache_dir: Path) -> Iterator[Entry]:
    for pattern, kind in FILES.items():
        for path in cache_dir.glob(pattern):
            with suppress(FileNotFoundError):
                yield Entry(kind, path, path, (stat := path.stat()).st_size, stat.st_mtime)


def _size_and_use(directory: Path, used: float) -> tuple[int, float]:
    """Bytes, and the given time of the last use; 0: the newest time of a file or directory in it."""
    size, newest = 0, used or directory.stat().st_mtime
    for folder, names, files in os.walk(directory):
        for path in (os.path.join(folder, name) for name in (*names, *files)):
            with suppress(OSError):  # another process removes it
                stat = os.lstat(path)
                size += 0 if os.path.isdir(path) else stat.st_size
                newest = newest if used else max(newest, stat.st_mtime)
    return size, newest


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text("ascii"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}

"""Digests of the contents of data files, which decide whether a source is tokenized again.

Files are hashed in full, which costs little compared with tokenizing them. A digest is kept in the cache with the
file's size, inode and times, and the file is read again only if one of these has changed. Among them is the time of the
last change of its inode, which the kernel sets and no program can set back: so a change in place is seen even if it
keeps size and modification time, and a file that was only touched is read once, but not tokenized.
"""

import concurrent.futures
import hashlib
import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from llm3.files import write_atomic

INDEX = "digests.json"  # in the cache directory: {path: [size, inode, mtime, ctime, sha256]}
SETTLED_SECONDS = 2.0  # a file that changed this recently may change again within the resolution of its times


def content_digest(files: Sequence[str | Path], cache_dir: Path) -> str:
    """The sha256 over the contents of files in this order, whatever their names and times. Raises OSError.

    Digests are kept in `cache_dir`, if it can be written to.
    """
    index, paths = Path(cache_dir) / INDEX, [os.path.realpath(file) for file in files]
    known = _read(index)
    stats = {path: _stat(path) for path in paths}
    changed = [path for path, stat in stats.items() if known.get(path, [])[:-1] != stat]
    if changed:
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
            digests = dict(zip(changed, threads.map(_hash, changed), strict=True))
        now = time.time_ns()
        found = {path: [*stats[path], digest] for path, digest in digests.items()}
        settled = {path: found[path] for path in found if now - max(stats[path][2:]) > SETTLED_SECONDS * 1e9}
        known |= found
        if settled:
            with suppress(OSError):  # a read-only or full disk: hash them again the next time
                write_atomic(index, json.dumps(_read(index) | settled))
    return hashlib.sha256("".join(known[path][-1] for path in paths).encode()).hexdigest()


def _stat(path: str) -> list[int]:
    stat = os.stat(path)
    return [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]


def _hash(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(index: Path) -> dict[str, list]:
    try:
        known = json.loads(index.read_text())
    except (OSError, ValueError):  # missing or damaged: hash the files again
        return {}
    return known if isinstance(known, dict) else {}

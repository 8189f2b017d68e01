"""Entries of a cache that are in use: each process that reads or builds one holds a shared lock on a file in it.

The kernel frees the locks of a process however it ends. `removed` takes an entry away only while nobody holds it.
"""

import errno
import fcntl
import json
import os
import secrets
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

SOURCE = "source.json"  # in an entry: what it was built from, and the file that is locked
COPIES = "datasets"  # the entry with what the datasets library has downloaded, unpacked and copied
UNLOCKED_SECONDS = 7 * 24 * 3600.0  # on a disk without locks, an entry that was used this recently counts as in use
DOOMED = ".removed-"  # the beginning of the name of a directory that is being deleted
MOST_HELD = 32  # open files of `hold_for_life`
BUSY = (errno.EWOULDBLOCK, errno.EACCES)  # another process has the lock


def begin(entry: Path, source: Mapping[str, Any]) -> BinaryIO | None:
    """Create the directory of an entry, if there is none, note what it is built from, and `hold` it. Raises OSError."""
    while True:
        entry.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError), open(entry / SOURCE, "x", encoding="utf-8") as file:
            file.write(json.dumps(source))
        with suppress(FileNotFoundError):  # it was removed meanwhile
            return hold(entry)


def hold(entry: Path) -> BinaryIO | None:
    """Hold an entry until the returned file is closed or forgotten, and note that it is used now.

    None if the disk has no locks, or if the entry has no file to lock and cannot be written. Raises FileNotFoundError
    if the entry is not there.
    """
    with suppress(OSError):  # of another user, or read-only
        os.utime(entry)
    try:
        file = open(entry / SOURCE, "rb", buffering=0)  # noqa: SIM115 - closed when it is forgotten
    except FileNotFoundError:
        if not entry.is_dir() or not os.access(entry, os.W_OK | os.X_OK):
            os.stat(entry)
            return None
        return begin(entry, {})
    try:
        fcntl.flock(file, fcntl.LOCK_SH)
    except OSError:
        file.close()
        return None
    if not os.path.samestat(os.fstat(file.fileno()), os.stat(entry / SOURCE)):
        file.close()
        raise FileNotFoundError(errno.ENOENT, "it was removed", str(entry))
    return file


_held: dict[Path, BinaryIO] = {}  # the entries that this process holds until it ends


def hold_for_life(entry: Path, *, create: bool = False) -> None:
    """Hold an entry, if there is one, until this process ends, or until it has held many others."""
    with suppress(OSError):  # without a lock, the time of its last use protects it
        if entry not in _held and (file := begin(entry, {}) if create else hold(entry)):
            _held[entry] = file
    while len(_held) > MOST_HELD:
        _held.pop(next(iter(_held))).close()


def read_source(entry: Path) -> dict[str, Any]:
    """What an entry was built from, as `begin` noted it; {} if it is not known."""
    try:
        found = json.loads((entry / SOURCE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def removed(path: Path, locked: Path, *, dry_run: bool = False) -> bool:
    """Remove a file or a directory of a cache unless a process holds the entry `locked`. Raises OSError.

    Returns whether it was removed, or with dry_run whether it would be. It vanishes at once, and is deleted then.
    """
    with suppress(FileNotFoundError), open(locked / SOURCE, "rb+", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in BUSY or time.time() - os.stat(locked).st_mtime < UNLOCKED_SECONDS:
                return False
        if not dry_run:
            _remove(path)
        return True
    if not dry_run:  # a file, or an entry of an earlier version
        _remove(path)
    return True


def _remove(path: Path) -> None:
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    doomed = path.with_name(DOOMED + secrets.token_hex(4))
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def remove_leftovers(cache_dir: Path) -> None:
    """Delete what a killed `removed` has left."""
    for path in (*cache_dir.glob(f"{DOOMED}*"), *cache_dir.glob(f"*/{DOOMED}*")):
        shutil.rmtree(path, ignore_errors=True)

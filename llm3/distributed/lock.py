"""The lock of a run directory: one process at a time may write there."""

import errno
import fcntl
import json
import logging
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from llm3.errors import FULL, NotWritten, UserError, writing

logger = logging.getLogger(__name__)

LOCK = ".lock"
BEAT_SECONDS = 10.0  # how often a holder touches its lock
DEAD_SECONDS = 120.0  # a holder that has not touched its lock for this long counts as dead


class Holder(NamedTuple):
    """The process that holds a workdir, as recorded in the lock file."""

    host: str
    process: int
    since: str
    command: str

    def __str__(self) -> str:
        return f"process {self.process} on {self.host} since {self.since} ({self.command})"


@contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Hold the workdir exclusively while this context lasts.

    The kernel frees the lock of a process however it ends. Some file systems, however, share no locks between hosts,
    and some have no locks at all. There, a holder is alive as long as it keeps touching the lock file. Raises UserError
    that names the holder, or if the directory cannot be created; NotWritten if the disk is full.
    """
    path = workdir / LOCK
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        handle = open(path, "ab+", buffering=0, opener=_open_own)  # noqa: SIM115 - held while the context lasts
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(
                f"{path} is a symbolic link, and llm3 would overwrite its target: remove the link"
            ) from error
        kind = NotWritten if error.errno in FULL else UserError
        raise kind(f"--workdir={workdir}: {error.strerror}: {error.filename}") from error
    with handle:
        own = _take(path, handle)
        ended = threading.Event()
        threading.Thread(target=_touch, args=(path, ended), name="lock", daemon=True).start()
        try:
            yield
        finally:
            ended.set()
            with suppress(OSError):
                if _holder(path) == own:
                    handle.truncate(0)


def _open_own(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _take(path: Path, handle: Any) -> Holder:
    """Record this process in the lock and return it. Raises UserError if another holder is alive."""
    own = Holder(socket.gethostname(), os.getpid(), time.strftime("%Y-%m-%dT%H:%M:%S%z"), _command())
    locked = True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"{path.parent} is in use by {_holder(path) or 'a process that has just started'}") from error
    except OSError:
        locked = False  # a network file system without locks
    before = _holder(path)
    if before and not (locked and before.host == own.host) and _is_alive(path, before, own.host):
        raise UserError(f"{path.parent} is in use by {before}")
    with writing(path):
        handle.truncate(0)
        handle.write(json.dumps(own._asdict()).encode())
    if not locked:
        time.sleep(BEAT_SECONDS / 10)  # if another process starts now, the last writer wins
        if (other := _holder(path)) != own:
            raise UserError(f"{path.parent} is in use by {other or 'another process'}")
    return own


def _command() -> str:
    return shlex.join(["python", "-m", "llm3", *sys.argv[1:]])


def _holder(path: Path) -> Holder | None:
    """The holder recorded in a lock file; None if it was released."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _is_alive(path: Path, holder: Holder, host: str) -> bool:
    """Whether the holder of a lock is alive. If that is unknown, wait for it to touch the lock file."""
    if holder.host == host and not _is_running(holder.process):
        return False
    before = _modified_at(path)
    age = time.time() - before
    seconds = min(max(DEAD_SECONDS - age, 3 * BEAT_SECONDS), DEAD_SECONDS)  # a few beats, as clocks differ
    logger.warning("%s is held by %s: waiting %.0f s for a sign of life", path, holder, seconds)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(BEAT_SECONDS / 10)
        if _modified_at(path) != before:
            return _holder(path) is not None
    logger.warning("%s: no sign of life for %.0f s, so its holder counts as dead", path, max(age, 0) + seconds)
    return False


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _modified_at(path: Path) -> float:
    with path.open() as file:  # on a network file system, opening the file refreshes its attributes
        return os.fstat(file.fileno()).st_mtime


def _touch(path: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT_SECONDS):
        with suppress(OSError):
            os.utime(path)

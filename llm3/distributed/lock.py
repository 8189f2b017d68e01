"""The lock of a directory, such as that of a stage: one process at a time may write there."""

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
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from llm3.errors import FULL, NotWritten, UserError, writing

logger = logging.getLogger(__name__)

LOCK = ".lock"
BEAT_SECONDS = 10.0  # how often a holder touches its lock
DEAD_SECONDS = 120.0  # a holder that has not touched its lock for this long counts as dead
ATTEMPTS = 10  # to take a lock, while others remove theirs with the directories that they have made
POLL_SECONDS = 0.1  # between two looks at a lock that is waited for
SHARED_SECONDS = 600.0  # to wait for the lock of a workdir
QUIET_SECONDS = 5.0  # of waiting, before the log says so


class InUse(UserError):
    """A directory that another process holds; the message names it."""


class Holder(NamedTuple):
    """The process that holds a directory, as recorded in the lock file."""

    host: str
    process: int
    since: str
    command: str
    locked: bool = True  # whether the kernel has locked the file for it

    def __str__(self) -> str:
        return f"process {self.process} on {self.host} since {self.since} ({self.command})"


@contextmanager
def lock(directory: Path, seconds: float = 0.0, remove: bool = False) -> Iterator[None]:
    """Hold a directory exclusively while this context lasts.

    The kernel frees the lock of a process however it ends. Some file systems, however, share no locks between hosts,
    and some have no locks at all. There, a holder is alive as long as it keeps touching the lock file. A directory that
    did not exist before, and holds nothing else in the end, is removed; with `remove`, one that did exist, too. Only
    under the kernel's lock: without it, others could be there. seconds: how long to wait for another holder.
    Raises InUse, UserError if the directory cannot be created, NotWritten if the disk is full.
    """
    path = directory / LOCK
    handle, own, created = _waited_for(path, seconds)
    with handle:
        ended = threading.Event()
        threading.Thread(target=_touch, args=(path, ended), name="lock", daemon=True).start()
        try:
            yield
        finally:
            ended.set()
            with suppress(OSError):
                if _holder(path) == own:
                    if (created or remove) and own.locked:
                        _remove_if_empty(path)
                    handle.truncate(0)


def shared(workdir: Path) -> AbstractContextManager[None]:
    """Hold the files that all runs in a workdir share, once no other process does. Raises InUse after some minutes."""
    return lock(workdir, SHARED_SECONDS)


def _waited_for(path: Path, seconds: float) -> tuple[BinaryIO, Holder, bool]:
    """As `_acquire`, which is tried again for some time while another process holds the lock."""
    began, silent = time.monotonic(), True
    while True:
        try:
            return _acquire(path)
        except InUse as error:
            waited = time.monotonic() - began
            if waited >= seconds:
                raise
            if silent and waited > QUIET_SECONDS:
                logger.warning("%s, and is waited for", error)
                silent = False
        time.sleep(POLL_SECONDS)


def _acquire(path: Path) -> tuple[BinaryIO, Holder, bool]:
    """(the lock file, this process in it, whether its directory had to be made). Raises as `lock`."""
    for _ in range(ATTEMPTS):
        with suppress(FileNotFoundError), ExitStack() as opened:  # another process has removed the directory it made
            created, handle = _open(path)
            opened.enter_context(handle)
            own = _take(path, handle)
            opened.pop_all()
            return handle, own, created
    raise UserError(f"{path.parent} is a link to a directory that does not exist, or others keep removing it")


def _open(path: Path) -> tuple[bool, BinaryIO]:
    """(whether the directory of the lock had to be made, the lock file). Raises FileNotFoundError if it is gone again.

    Also raises UserError and NotWritten, as `lock`.
    """
    directory = path.parent
    try:
        created = False
        with suppress(FileExistsError):  # if it is no directory, the lock cannot be opened
            directory.mkdir(parents=True)
            created = True
        return created, open(path, "ab+", buffering=0, opener=_open_own)
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(
                f"{path} is a symbolic link, and llm3 would overwrite its target: remove the link"
            ) from error
        kind = NotWritten if error.errno in FULL else UserError
        raise kind(f"{directory} cannot be written: {error.strerror}: {error.filename}") from error


def holder(directory: Path) -> Holder | None:
    """The process that holds a directory; None if none does, or if it shows no sign of life."""
    path = directory / LOCK
    found = _holder(path)
    if found is None or (found.host == socket.gethostname() and not is_running(found.process)):
        return None
    modified = _modified_at(path)
    return found if modified is not None and time.time() - modified < DEAD_SECONDS else None


def recorded(directory: Path) -> Holder | None:
    """The process that the lock of a directory names, alive or not."""
    return _holder(directory / LOCK)


def _open_own(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _remove_if_empty(path: Path) -> None:
    """Remove the lock and its directory, if that holds nothing else; the kernel's lock is held meanwhile.

    A process that has opened the lock before sees in `_take` that it has another file, and opens that of a new
    directory. A directory into which something is written meanwhile stays.
    """
    with suppress(OSError):
        if os.listdir(path.parent) == [path.name]:
            path.unlink()
            path.parent.rmdir()


def _take(path: Path, handle: BinaryIO) -> Holder:
    """Record this process in the lock, and return it.

    Raises InUse if another holder is alive, and FileNotFoundError if its last holder has removed the file.
    """
    locked, held = True, False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        locked, held = False, True
    except OSError:
        locked = False  # a network file system without locks
    own = Holder(socket.gethostname(), os.getpid(), time.strftime("%Y-%m-%dT%H:%M:%S%z"), command(), locked)
    before = _holder(path)
    # The kernel knows the processes of this host. A server may keep the lock of another host after its death: then, as
    # where there are no locks, a holder is alive as long as it touches the file.
    known = before is not None and before.host == own.host and before.locked
    if held and (before is None or known):
        raise InUse(f"{path.parent} is in use by {before or 'a process that has just started'}")
    if before is not None and not (locked and known) and _is_alive(path, before, own.host):
        raise InUse(f"{path.parent} is in use by {before}")
    with writing(path):
        handle.truncate(0)
        handle.write(json.dumps(own._asdict()).encode())
        os.fsync(handle.fileno())  # other hosts look for it
    if not locked:
        time.sleep(BEAT_SECONDS / 10)  # if another process starts now, the last writer wins
    if not os.path.samestat(os.fstat(handle.fileno()), path.stat()):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    if not locked and (other := _holder(path)) != own:
        raise InUse(f"{path.parent} is in use by {other or 'another process'}")
    return own


def command() -> str:
    return shlex.join(["python", "-m", "llm3", *sys.argv[1:]])


def _holder(path: Path) -> Holder | None:
    """The holder recorded in a lock file; None if it was released."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _is_alive(path: Path, holder: Holder, host: str) -> bool:
    """Whether the holder of a lock is alive. If that is unknown, wait for it to touch the lock file."""
    if holder.host == host and not is_running(holder.process):
        return False
    if (before := _modified_at(path)) is None:
        return False
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


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _modified_at(path: Path) -> float | None:
    """The time of the last write; None if the file was removed."""
    try:
        with path.open() as file:  # on a network file system, opening the file refreshes its attributes
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None


def _touch(path: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT_SECONDS):
        with suppress(OSError):
            os.utime(path)

"""The lock of a run in a bucket, which has no locks: an object that its holder writes again and again."""

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llm3 import remote
from llm3.distributed import lock as locks
from llm3.distributed.lock import LOCK, Holder
from llm3.errors import NotWritten, UserError

logger = logging.getLogger(__name__)

BEATS = 3  # a holder that has not written its lock for so many beats is dead


@contextmanager
def bucket_held(workdir: Path) -> Iterator[None]:
    """Hold a run exclusively while this context lasts, if `workdir` is the copy of a run in a bucket."""
    url = remote.url_of(workdir)
    if url is None:
        yield
        return
    held = _Lock(f"{url}/{LOCK}")
    held.take()
    ended = threading.Event()
    threading.Thread(target=held.beat, args=(ended,), name="lock", daemon=True).start()
    try:
        remote.pull()  # what its last holder has left
        yield
    finally:
        with suppress(NotWritten):  # tried again at the end of the command
            remote.push()  # for its next holder
        ended.set()
        held.release()


def recorded(workdir: Path) -> Holder | None:
    """The process that the lock of a workdir names, alive or not."""
    if (url := remote.url_of(workdir)) is None:
        return locks.recorded(workdir)
    found = _Lock(f"{url}/{LOCK}").read()
    return None if found is None else Holder(**found["holder"])


class _Lock:
    """An object with the holder, a random number for this attempt to hold it, and the number of the beat."""

    def __init__(self, url: str):
        self._url, self._name = url, remote.name_of(url)
        self._store, self._own = remote.file_system(url), secrets.token_hex(8)
        self._holder = Holder(socket.gethostname(), os.getpid(), time.strftime("%Y-%m-%dT%H:%M:%S%z"), locks.command())
        self._beats = 0

    def take(self) -> None:
        """Raises UserError that names the holder, if there is one that is alive."""
        found = self.read()
        if found is not None and self._is_alive(found):
            raise UserError(f"{self._url.removesuffix(f'/{LOCK}')} is in use by {Holder(**found['holder'])}")
        mode = "overwrite"
        if found is None:
            mode = "create"  # fails if another process has just created it
        try:
            self._write(mode)
        except FileExistsError:
            pass
        except Exception as error:  # of several libraries
            raise UserError(f"{self._url} cannot be written: {error}") from error
        time.sleep(locks.BEAT_SECONDS / 10)  # if another process has found the same dead holder, the last writer wins
        now = self.read()
        if now is None or now["own"] != self._own:
            other = Holder(**now["holder"]) if now else "another process"
            raise UserError(f"{self._url.removesuffix(f'/{LOCK}')} is in use by {other}")

    def beat(self, ended: threading.Event) -> None:
        """Write the object until the event, while it is that of this process."""
        while not ended.wait(locks.BEAT_SECONDS):
            with suppress(Exception):  # of several libraries; the next beat may succeed
                if self._is_own():
                    self._write("overwrite")

    def release(self) -> None:
        """Remove the object, if this process still holds it."""
        with suppress(Exception):
            if self._is_own():
                self._store.rm_file(self._name)

    def _is_own(self) -> bool:
        found = self.read()
        return found is not None and found["own"] == self._own

    def _is_alive(self, found: dict[str, Any]) -> bool:
        holder = Holder(**found["holder"])
        if holder.host == self._holder.host and not locks.is_running(holder.process):
            return False
        seconds = BEATS * locks.BEAT_SECONDS
        logger.warning("%s is held by %s: waiting %.0f s for a sign of life", self._url, holder, seconds)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(locks.BEAT_SECONDS / 10)
            if (now := self.read()) != found:
                return now is not None
        return False

    def read(self) -> dict[str, Any] | None:
        """What the object holds; None: there is none."""
        try:
            return json.loads(self._store.cat_file(self._name))
        except FileNotFoundError:
            return None

    def _write(self, mode: str) -> None:
        self._beats += 1
        content = {"holder": self._holder._asdict(), "own": self._own, "beat": self._beats}
        self._store.pipe_file(self._name, json.dumps(content).encode(), mode=mode)

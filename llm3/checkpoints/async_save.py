"""Asynchronous Orbax saves, and the errors of their background threads.

When a save fails, every thread involved logs a traceback. This module suppresses that noise and raises the error once,
to the caller that waits for the save.
"""

import logging
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import jax

from llm3.distributed.interrupts import unfinished_saves

POLL_SECONDS = 2.0


class _Failures(logging.Filter):
    """Suppresses the errors that Orbax threads log, and remembers the last one."""

    last: BaseException | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        frames = traceback.extract_tb(error.__traceback__ if error else None)
        files = [record.pathname, *(frame.filename for frame in frames)]
        if record.levelno < logging.WARNING or not any("orbax" in file for file in files):
            return True
        self.last = error or self.last
        return False


_failures = _Failures()
for _name in ("absl", "asyncio"):
    logging.getLogger(_name).addFilter(_failures)
warnings.filterwarnings("ignore", "coroutine '.*' was never awaited", RuntimeWarning)
_default_hook = sys.unraisablehook


def _unraisable_hook(unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":  # a TensorStore callback after shutdown
        _default_hook(unraisable)


sys.unraisablehook = _unraisable_hook


class Deadlock(Exception):
    """A save thread has failed, and the remaining ones wait for another process, which waits for this one."""


class Response(Protocol):
    """The part of the response of Orbax that is used."""

    def result(self, timeout: float | None = None) -> Any: ...


class AsyncSave:
    """One save of `step`, created before it begins; `response` is the response of Orbax once it has begun.

    arrays: the names of its parts that hold arrays.
    """

    def __init__(self, step: int, arrays: Sequence[str]):
        self.step, self.arrays = step, arrays
        self.response: Response | None = None
        _failures.last = None

    def wait(self) -> None:
        """Return when the save is finished. Raises any error of Orbax, and Deadlock from its cause."""
        try:
            self._result()
        except Exception:
            unfinished_saves.discard(self)
            raise
        unfinished_saves.discard(self)  # not after Ctrl-C: the save goes on

    def _result(self) -> Any:
        assert self.response is not None, "the save has begun"
        failed = None
        while jax.process_count() > 1:
            started = time.monotonic()
            try:
                return self.response.result(POLL_SECONDS)
            except TimeoutError:
                if time.monotonic() - started < POLL_SECONDS:  # raised by the save itself
                    raise
            if failed is not None:
                raise Deadlock from failed
            failed = _failures.last
        return self.response.result()

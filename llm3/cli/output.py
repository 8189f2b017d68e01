"""Standard output and error that nobody reads, or that cannot be written.

A reader may be gone (`python -m llm3 plan ... | head`), a terminal closed, a disk full, and a stream closed from the
start (`>&-`).
"""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from llm3.errors import NotWritten


class ReaderGone(Exception):
    """Nobody reads the output any more. Not a BrokenPipeError, which some libraries catch."""


GONE = (errno.EPIPE, errno.EIO)  # of a pipe, of a terminal


class _Output:
    """A stream that raises ReaderGone when its reader is gone, and NotWritten when a disk refuses.

    With `goes_on`, it discards all further output instead.
    """

    def __init__(self, stream: Any, goes_on: bool):
        self._stream, self._goes_on = stream, goes_on

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError as error:
            self._discard(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._discard(error)

    def _discard(self, error: OSError) -> None:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())
        if self._goes_on:
            return
        if error.errno in GONE:
            raise ReaderGone from None
        raise NotWritten(f"the output was not written: {error.strerror}") from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def watched_output(goes_on: bool) -> Iterator[None]:
    """While this context lasts, output that fails raises ReaderGone or NotWritten, or is ignored with `goes_on`."""
    before = sys.stdout, sys.stderr
    streams = [open(os.devnull, "w") if each is None else each for each in before]  # noqa: SIM115 - keeps 1 and 2 taken
    sys.stdout, sys.stderr = (_Output(stream, goes_on) for stream in streams)
    try:
        yield
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        for ours in (sys.stdout, sys.stderr):
            with suppress(ReaderGone, NotWritten, AttributeError, ValueError):
                ours.flush()
        sys.stdout, sys.stderr = before

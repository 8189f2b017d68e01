"""Standard output and error whose reader may be gone, as in `python -m llm3 plan ... | head`."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


class ReaderGone(Exception):
    """Nobody reads the output any more. Not a BrokenPipeError, which some libraries catch."""


class _Output:
    """A stream that raises ReaderGone when its reader is gone or, with `goes_on`, discards all further output."""

    def __init__(self, stream: Any, goes_on: bool):
        self._stream, self._goes_on = stream, goes_on

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except BrokenPipeError:
            self._discard()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._discard()

    def _discard(self) -> None:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())
        if not self._goes_on:
            raise ReaderGone from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def watched_output(goes_on: bool) -> Iterator[None]:
    """While this context lasts, writing for a reader that is gone raises ReaderGone, or is ignored with `goes_on`."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_Output(stream, goes_on) for stream in before)
    try:
        yield
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        for ours in (sys.stdout, sys.stderr):
            with suppress(ReaderGone, AttributeError, ValueError):
                ours.flush()
        sys.stdout, sys.stderr = before

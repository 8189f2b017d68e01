"""Errors that a user can act on, checks that raise them, and the exit status of each way in which a run can end."""

import difflib
import enum
import errno
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class Exit(enum.IntEnum):
    """The exit status of the command line; 128 + the signal's number after Ctrl-C."""

    DONE = 0
    BAD_INPUT = 2
    DIVERGED = 3  # the guard left out too many steps in a row
    HUNG = 4  # a step, a read of data or a save took longer than hang_seconds
    NOT_WRITTEN = 5  # a checkpoint or another file: what was there before is whole
    PREEMPTED = 75  # SIGTERM: all is saved, to be run again (EX_TEMPFAIL of sysexits.h)


class UserError(Exception):
    """Bad input, found before any device work. The command line prints it without a traceback and exits with 2."""

    exit = Exit.BAD_INPUT


class Diverged(UserError):
    """Too many steps in a row had to be left out."""

    exit = Exit.DIVERGED


class NotWritten(UserError):
    """A file could not be written, e.g. because a disk is full."""

    exit = Exit.NOT_WRITTEN


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # what only a write can meet with: a full disk, a quota, read-only


@contextmanager
def writing(what: object, *numbers: int) -> Iterator[None]:
    """Raise NotWritten where the operating system refuses to write `what`; numbers: for these errors only."""
    try:
        yield
    except OSError as error:
        if numbers and error.errno not in numbers:
            raise
        raise NotWritten(f"{what} was not written: {error.strerror or error}") from error


def causes(error: BaseException) -> list[BaseException]:
    """What an error was raised from, the first cause first, and the error itself."""
    return [*(causes(error.__cause__) if error.__cause__ is not None else []), error]


def cause(error: BaseException) -> str:
    """The first cause, on one line."""
    first = causes(error)[0]
    return f"{type(first).__name__}: {' '.join(str(first).split())[:300]}"


def refused(error: BaseException) -> str | None:
    """What the operating system said, where that is what an error was raised from; None for any other error."""
    for each in causes(error):
        if isinstance(each, OSError):
            return each.strerror or str(each)
        if number := re.search(r"os_error_code='(\d+)'", str(each)):  # as TensorStore says it
            return os.strerror(int(number[1]))
    return None


def listed(names: Iterable[str], most: int = 5) -> str:
    """Names for a message, the first few of them."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def nearest(name: str, options: Iterable[str]) -> str:
    """The end of an error message: the nearest of `options` to `name`, and all of them."""
    names = sorted(str(option) for option in options)
    close = difflib.get_close_matches(str(name), names, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(match) for match in close)}? " if close else ""
    return f"{hint}valid: {', '.join(names) or '(none)'}"


def one_of(field: str, value: Any, options: Iterable[Any]) -> None:
    """Raise a UserError unless a config's `field` has one of `options` as its value."""
    if value not in (options := tuple(options)):
        raise UserError(f"config: {field}={value!r}: {nearest(value, options)}")


def at_least(field: str, value: float, least: float) -> None:
    """Raise a UserError unless the value of a config's `field` is at least `least`."""
    if value < least:
        raise UserError(f"config: {field}={value!r}: expected at least {least}")

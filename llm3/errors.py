"""Errors that a user can act on, checks that raise them, and the exit status for each way that a run can end."""

import difflib
import enum
import errno
import functools
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class Exit(enum.IntEnum):
    """The exit status of the command line; 128 + the signal's number after Ctrl-C."""

    DONE = 0
    BAD_INPUT = 2
    DIVERGED = 3  # too many steps in a row had a non-finite loss or gradient
    HUNG = 4  # a step, a read of data or a save took longer than hang_seconds
    NOT_WRITTEN = 5  # a checkpoint or another file; earlier files are intact
    PREEMPTED = 75  # SIGTERM: everything is saved, rerun the command to resume (EX_TEMPFAIL in sysexits.h)


class UserError(Exception):
    """Bad input, found before any device work if possible. The command line prints it without a traceback; exit 2."""

    exit: int = Exit.BAD_INPUT


class Diverged(UserError):
    """Too many steps in a row had a non-finite loss or gradient; `first` is the first of them, counted from 1."""

    exit = Exit.DIVERGED

    def __init__(self, message: str, first: int = 1):
        super().__init__(message)
        self.first = first


class NotWritten(UserError):
    """A file could not be written, e.g. because a disk is full."""

    exit = Exit.NOT_WRITTEN


class OutOfMemory(UserError):
    """A step or an evaluation needs more memory than a device has."""


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # full disk, quota exceeded, read-only: only a write raises these


@contextmanager
def writing(what: object, *numbers: int) -> Iterator[None]:
    """Turn an OSError into NotWritten that names `what`. numbers: only for these values of errno; none: for all."""
    try:
        yield
    except OSError as error:
        if numbers and error.errno not in numbers:
            raise
        raise NotWritten(f"{what} was not written: {error.strerror or error}") from error


def cause_chain(error: BaseException) -> list[BaseException]:
    """The chain of `__cause__`, the root cause first, the error itself last."""
    return [*(cause_chain(error.__cause__) if error.__cause__ is not None else []), error]


def root_cause(error: BaseException) -> str:
    """The type and message of the root cause, on one line."""
    first = cause_chain(error)[0]
    return f"{type(first).__name__}: {' '.join(str(first).split())[:300]}"


def os_reason(error: BaseException) -> str | None:
    """The message of the operating system if an OSError caused this error, else None."""
    for each in cause_chain(error):
        if isinstance(each, OSError):
            return each.strerror or str(each)
        if number := re.search(r"os_error_code='(\d+)'", str(each)):  # the wording of TensorStore
            return os.strerror(int(number[1]))
    return None


@functools.cache
def say(message: str) -> None:
    """Print a message to stderr, once."""
    print(message, file=sys.stderr)


def listed(names: Iterable[str], most: int = 5) -> str:
    """The first `most` names for a message, and how many more there are."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number with its noun: "1 row", "2,000 rows"; plural: one that is not the noun with an "s"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def together(errors: Sequence[UserError]) -> UserError:
    """One error that says all, each on a line of its own."""
    return errors[0] if len(errors) == 1 else UserError("\n".join(dict.fromkeys(map(str, errors))))


def nearest(name: str, options: Iterable[str]) -> str:
    """The end of an error message: the nearest of `options` to `name`, and all of them."""
    names = sorted(str(option) for option in options)
    return f"{closest(name, names)}valid: {', '.join(names) or '(none)'}"


def closest(name: str, names: Iterable[str]) -> str:
    """The nearest of many names as a question with a space behind it, "did you mean 'x'? "; "" if none is near."""
    close = difflib.get_close_matches(str(name), list(names), n=2, cutoff=0.5)
    return f"did you mean {' or '.join(repr(match) for match in close)}? " if close else ""


def within(where: str, error: UserError) -> UserError:
    """The error of a field, with the place of the field in front: "steps=0: ..." -> "config.stages.x.steps=0: ..."."""
    text = str(error).removeprefix("config: ")
    glue = "." if re.match(r"[a-z_][\w.*]*(\[\d+\])*(=| is empty|: )", text) else ": "
    return type(error)(f"{where}{glue}{text}")


def one_of(field: str, value: Any, options: Iterable[Any]) -> None:
    """Raise a UserError unless a config's `field` has one of `options` as its value."""
    if value not in (options := tuple(options)):
        raise UserError(f"config: {field}={value!r}: {nearest(value, options)}")


def check_share(field: str, share: float) -> None:
    """Raise a UserError unless a share is in (0, 1]."""
    if not 0 < share <= 1:
        raise UserError(f"{field}={share!r}: expected a share above 0, up to 1")


def at_least(field: str, value: float, least: float) -> None:
    """Raise a UserError unless the value of a config's `field` is at least `least`."""
    if value < least:
        raise UserError(f"config: {field}={value!r}: expected at least {least}")

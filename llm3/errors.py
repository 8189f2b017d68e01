"""Errors that a user can act on, and the exit status of each way in which a run can end."""

import difflib
import enum
from collections.abc import Iterable


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


def nearest(name: str, options: Iterable[str]) -> str:
    """The end of an error message: the nearest of `options` to `name`, and all of them."""
    names = sorted(str(option) for option in options)
    close = difflib.get_close_matches(str(name), names, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(match) for match in close)}? " if close else ""
    return f"{hint}valid: {', '.join(names) or '(none)'}"

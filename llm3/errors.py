"""Errors that a user can act on: what was wrong, what was expected, and the nearest right name."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input, found before any device work. The command line prints it without a traceback and exits with 2."""


def nearest(name: str, options: Iterable[str]) -> str:
    """The end of an error message: the nearest of `options` to `name`, and all of them."""
    names = sorted(str(option) for option in options)
    close = difflib.get_close_matches(str(name), names, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(match) for match in close)}? " if close else ""
    return f"{hint}valid: {', '.join(names) or '(none)'}"

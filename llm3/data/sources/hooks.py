"""Transforms and filters of rows: functions that a config names as "module:function"."""

import difflib
import functools
import hashlib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llm3.data.formats import BadRow
from llm3.errors import UserError, nearest


def apply_transforms(row: dict[str, Any], transforms: Sequence[str], where: str) -> dict[str, Any]:
    """The row after all transforms, in order. where: the source and number of the row, for messages.

    A transform may raise BadRow. Any other exception, or a result that is not a dict, becomes a UserError.
    """
    for spec in transforms:
        row = _call(spec, "transforms", row, where)
        if not isinstance(row, dict):
            raise UserError(f"{where}: transforms: {spec!r} returned {type(row).__name__}, expected a row: a dict")
    return row


def passes_filters(row: dict[str, Any], filters: Sequence[str], where: str) -> bool:
    """Whether all filters keep the row. Raises the same errors as `apply_transforms`."""
    return all(_call(spec, "filters", row, where) for spec in filters)


def _call(spec: str, field: str, row: dict[str, Any], where: str) -> Any:
    function = load_function(spec, field)
    try:
        return function(row)
    except (BadRow, UserError):
        raise
    except Exception as error:
        raise UserError(f"{where}: {field}: {spec!r} raised {type(error).__name__}: {error}") from error


@functools.cache
def load_function(spec: str, field: str) -> Callable[[dict[str, Any]], Any]:
    """The function that `sources.*.{field}` names. Raises UserError if there is none."""
    where = f"config: sources.*.{field}={spec!r}"
    name, colon, function = spec.partition(":")
    if not (name and colon and function):
        raise UserError(f"{where}: expected 'module:function'")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise UserError(f"{where}: its module needs {error.name!r}, which is not installed") from error
        raise UserError(f"{where}: no module {error.name!r}{_near_module(error.name)}") from None
    except Exception as error:
        raise UserError(f"{where}: importing {name!r} raised {type(error).__name__}: {error}") from error
    found = getattr(module, function, None)
    if found is None:
        names = [each for each, what in vars(module).items() if inspect.isroutine(what) and not each.startswith("_")]
        raise UserError(f"{where}: {name!r} has no function {function!r}: {nearest(function, names)}")
    if not callable(found):
        raise UserError(f"{where}: it is of type {type(found).__name__}, expected a function")
    return found


def _near_module(name: str) -> str:
    """The end of an error message: modules with similar names in the package of a missing module."""
    parent = name.rpartition(".")[0]
    inside = getattr(importlib.import_module(parent), "__path__", []) if parent else None
    names = [f"{parent}.{each.name}".lstrip(".") for each in pkgutil.iter_modules(inside)]
    near = difflib.get_close_matches(name, names, n=2, cutoff=0.6)
    return f": did you mean {' or '.join(map(repr, near))}?" if near else " on the Python path"


def file_digest(spec: str, field: str) -> str:
    """The sha256 of the file that defines the function; it changes when the function does."""
    file = inspect.getsourcefile(inspect.unwrap(load_function(spec, field)))
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""

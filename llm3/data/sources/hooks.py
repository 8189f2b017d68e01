"""Transforms and filters of rows: functions that a config names as "module:function"."""

import ast
import difflib
import functools
import hashlib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llm3 import config_folder
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
        try:
            return function(row)
        except ModuleNotFoundError:  # it imports a neighbour only when it is called
            with config_folder.on_path():
                return function(row)
    except (BadRow, UserError):
        raise
    except Exception as error:
        raise UserError(f"{where}: {field}: {spec!r} raised {type(error).__name__}: {error}") from error


def load_function(spec: str, field: str) -> Callable[[dict[str, Any]], Any]:
    """The function that `sources.*.{field}` names, from the config's folder or installed. Raises UserError."""
    return _load_function(spec, field, config_folder.current())


@functools.cache
def _load_function(spec: str, field: str, folder: str) -> Callable[[dict[str, Any]], Any]:
    where = f"config: sources.*.{field}={spec!r}"
    name, colon, function = spec.partition(":")
    if not (name and colon and function):
        raise UserError(f"{where}: expected 'module:function'")
    try:
        with config_folder.on_path():
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
    """The sha256 of the file that defines the function, and of the files beside the config that it imports."""
    file = inspect.getsourcefile(inspect.unwrap(load_function(spec, field)))
    if not file:
        return ""
    contents = [Path(each).read_bytes() for each in (file, *sorted(_imported(file, {file}) - {file}))]
    return hashlib.sha256(b"".join(contents)).hexdigest()


def _imported(file: str, found: set[str]) -> set[str]:
    """The files in the config's folder that a file imports, directly or through each other, and those in `found`."""
    for node in ast.walk(ast.parse(Path(file).read_bytes())):
        names = [each.name for each in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            module = f"{_package(file, node.level)}{node.module or ''}"
            names = [module, *(f"{module}.{name}".removeprefix(".") for name in names)]
        names = [".".join(parts[: n + 1]) for parts in (name.split(".") for name in names) for n in range(len(parts))]
        for used in filter(None, map(config_folder.file_of, names)):
            if used not in found:
                found.add(used)
                _imported(used, found)
    return found


def _package(file: str, level: int) -> str:
    """What a relative import of this level, in a file of the config's folder, puts before its names: "pkg."."""
    folder = Path(file).resolve().parents[level - 1] if level else None
    if folder is None or not folder.is_relative_to(Path(config_folder.current()).resolve()):
        return ""
    return "".join(f"{part}." for part in folder.relative_to(Path(config_folder.current()).resolve()).parts)

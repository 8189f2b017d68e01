"""Plugins by name: a package is its own registry, and each of its modules (a file or a folder) is one plugin."""

import ast
import dataclasses
import functools
import importlib
import importlib.util
import pkgutil
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from llm3.errors import UserError, nearest, within

DECLARED = ("WINDOWS", "HEAD", "LABELLED", "CAUSAL", "BETTER", "REQUIRES", "Options")
SLOW = ("jax", "flax", "optax", "llm3")  # packages that are not imported for a plugin's declarations


def plugin_names(folder: ModuleType | str) -> list[str]:
    """The names of the plugins of a package, sorted. folder: the package, or its name in llm3."""
    path = [str(Path(__file__).parent / folder)] if isinstance(folder, str) else folder.__path__
    return sorted(module.name for module in pkgutil.iter_modules(path))


def load_plugin(folder: ModuleType, name: str) -> ModuleType:
    """The plugin of this name. Raises UserError with the nearest names if there is none."""
    if name not in (known := plugin_names(folder)):
        kind = folder.__name__.rpartition(".")[2].removesuffix("s")
        raise UserError(f"{kind} {name!r}: {nearest(name, known)}")
    return importlib.import_module(f"{folder.__name__}.{name}")


@functools.cache
def declared(folder: str, name: str) -> Any:
    """The constants and the `Options` of a plugin, read without what the rest of its file imports.

    So a config is checked before jax is imported, which takes seconds. folder: "objectives" or "evals". Raises
    UserError with the nearest names if there is no such plugin.
    """
    if name not in (known := plugin_names(folder)):
        raise UserError(f"{folder.removesuffix('s')} {name!r}: {nearest(name, known)}")
    file = Path(__file__).parent / folder / f"{name}.py"
    file = file if file.is_file() else file.with_suffix("") / "__init__.py"
    scope = {"__name__": f"llm3.{folder}.{name}"}
    try:
        code = ast.Module(_declarations(ast.parse(file.read_bytes())), [])
        exec(compile(code, str(file), "exec", dont_inherit=True), scope)
    except Exception:  # a declaration needs more than its constants and the libraries that are quick to import
        return importlib.import_module(f"llm3.{folder}.{name}")
    return SimpleNamespace(**{each: scope[each] for each in DECLARED if each in scope})


def _declarations(module: ast.Module) -> list[ast.stmt]:
    """The statements of a plugin that `DECLARED` needs, directly or through each other, but no slow import."""
    defined = {name: each for each in module.body for name in _defined(each)}
    wanted: list[str] = [*DECLARED]
    needed: set[ast.stmt] = set()
    while wanted:
        statement = defined.get(wanted.pop())
        if statement is not None and statement not in needed:
            needed.add(statement)
            wanted += [node.id for node in ast.walk(statement) if isinstance(node, ast.Name)]
    return [each for each in module.body if each in needed and not _is_slow(each)]


def _defined(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.ClassDef | ast.FunctionDef):
        return [statement.name]
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return [each.asname or each.name.partition(".")[0] for each in statement.names]
    return [node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]


def _is_slow(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.ImportFrom):
        names = [statement.module or ""]
    else:
        names = [each.name for each in statement.names] if isinstance(statement, ast.Import) else []
    return any(name.partition(".")[0] in SLOW and name != "llm3.errors" for name in names)


def check_installed(plugin: Any, what: str) -> None:
    """Raise UserError unless the packages that a plugin `REQUIRES` beyond llm3's own are there."""
    for package, extra in getattr(plugin, "REQUIRES", {}).items():
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{what}: needs {package}, which is not installed: pip install 'llm3[{extra}]'")


def read_options(plugin: Any, given: dict[str, Any], where: str) -> Any:
    """The `Options` of a plugin, or of what it `declared`, built from a config; None if it has none.

    Raises UserError naming `where`.
    """
    known = [field.name for field in dataclasses.fields(plugin.Options)] if hasattr(plugin, "Options") else []
    for name in given:
        if name not in known:
            raise UserError(f"{where}.{name}: no such option; {nearest(name, known)}")
    try:
        return plugin.Options(**given) if known else None
    except UserError as error:
        raise within(where, error) from None
    except NameError:
        if not isinstance(plugin, SimpleNamespace):
            raise
        return None  # its checks need the rest of the file: they are made once the plugin itself is imported
    except TypeError as error:
        raise UserError(f"{where}: {error}") from None

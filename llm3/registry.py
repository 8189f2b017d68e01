"""Plugins by name: a package is its own registry, and each of its modules (a file or a folder) is one plugin.

A plugin of a user is named by its import path: "my_package.my_objective" is a module like those of the package;
"my_package.losses:entropy" is something in a module: a module, a class or a namespace that holds the names of a plugin,
or only its function (`loss`, `evaluate`), whose other names are those of its module. Modules are looked for in the
folder of the config first, then among the installed packages.
"""

import ast
import dataclasses
import functools
import importlib
import importlib.util
import pkgutil
from pathlib import Path
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

from llm3 import config_folder
from llm3.errors import UserError, closest, nearest, within

DECLARED = ("WINDOWS", "HEAD", "LABELLED", "CAUSAL", "BETTER", "REQUIRES", "Options")
SLOW = ("jax", "flax", "optax", "llm3")  # packages that are not imported for a plugin's declarations


def plugin_names(folder: ModuleType | str) -> list[str]:
    """The names of the plugins of a package, sorted. folder: the package, or its name in llm3."""
    path = [str(Path(__file__).parent / folder)] if isinstance(folder, str) else folder.__path__
    return sorted(module.name for module in pkgutil.iter_modules(path))


# the names that a plugin of a folder must have; the last one is its function
NEEDED = {
    "objectives": ("WINDOWS", "HEAD", "LABELLED", "CAUSAL", "loss"),
    "evals": ("WINDOWS", "HEAD", "CAUSAL", "BETTER", "evaluate"),
    "formats": ("texts", "encode", "read_row"),
    "windows": ("WindowTable",),
    "trackers": ("metrics", "samples", "result", "close"),
}
KINDS = {"objectives": "objective", "evals": "evaluation", "formats": "row format", "windows": "kind of windows"}


def load_plugin(folder: ModuleType, name: str) -> Any:
    """The plugin of this name, or at this import path. Raises UserError with the nearest names if there is none."""
    short = folder.__name__.rpartition(".")[2]
    if is_path(name):
        return _at_path(short, name, config_folder.current())
    if name not in (known := plugin_names(folder)):
        raise UserError(f"{_kind(short)} {name!r}: {nearest(name, known)}")
    return importlib.import_module(f"{folder.__name__}.{name}")


def is_path(name: str) -> bool:
    """Whether a plugin is named by its import path."""
    return "." in name or ":" in name


def _kind(folder: str) -> str:
    return KINDS.get(folder, folder.removesuffix("s"))


def check_known(folder: str, name: str, where: str) -> None:
    """Raise UserError, starting with `where`, for a plugin that does not exist. folder: its name in llm3."""
    if is_path(name):
        try:
            _at_path(folder, name, config_folder.current())
        except UserError as error:
            raise UserError(f"{where}: {error}") from error.__cause__
    elif name not in (known := plugin_names(folder)):
        raise UserError(f"{where}={name!r}: {nearest(name, known)} (or an import path: 'my_package.my_file:name')")


@functools.cache
def _at_path(folder: str, name: str, config_dir: str) -> Any:
    """The plugin at an import path. config_dir: the folder of the config, part of what identifies it."""
    folder = folder.rpartition("/")[2]
    path, _, attribute = name.partition(":")
    what = f"{_kind(folder)} {name!r}"
    try:
        with config_folder.on_path():
            module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name and (path == error.name or path.startswith(f"{error.name}.")):
            beside = [each.name for each in pkgutil.iter_modules([config_dir])] if config_dir else []
            where = f", neither in {config_dir} nor installed" if config_dir else ""
            raise UserError(
                f"{what}: there is no module {error.name}{where}; {closest(path, beside)}".rstrip("; ")
            ) from None
        raise UserError(f"{what}: importing it failed: {error}") from error
    except Exception as error:
        raise UserError(f"{what}: importing it failed: {type(error).__name__}: {error}") from error
    found: Any = module
    for part in attribute.split(".") if attribute else ():
        if not hasattr(found, part):
            names = [each for each in vars(found) if not each.startswith("_")]
            raise UserError(
                f"{what}: {getattr(found, '__name__', path)} has no {part}; {closest(part, names)}".rstrip("; ")
            )
        found = getattr(found, part)
    if isinstance(found, FunctionType):
        found = _around(found, module, folder)
    if missing := [each for each in NEEDED.get(folder, ()) if not hasattr(found, each)]:
        raise UserError(
            f"{what}: lacks {', '.join(missing)}; the docstring of llm3/{folder}/__init__.py says what it is"
        )
    return found


def _around(function: FunctionType, module: ModuleType, folder: str) -> ModuleType:
    """The plugin whose function is `function`, with the other names of its module."""
    plugin = ModuleType(function.__name__, function.__doc__)
    vars(plugin).update({name: each for name, each in vars(module).items() if not name.startswith("__")})
    setattr(plugin, NEEDED[folder][-1], function)
    return plugin


def declared(folder: str, name: str) -> Any:
    """The constants and the `Options` of a plugin, read without what the rest of its file imports.

    So a config is checked before jax is imported, which takes seconds; a plugin at an import path is imported. folder:
    "objectives" or "evals". Raises UserError with the nearest names if there is no such plugin.
    """
    if is_path(name):
        return _at_path(folder, name, config_folder.current())
    return _declared(folder, name)


@functools.cache
def _declared(folder: str, name: str) -> Any:
    if name not in (known := plugin_names(folder)):
        raise UserError(f"{_kind(folder)} {name!r}: {nearest(name, known)}")
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
        check_package(package, extra, what)


def check_package(package: str, extra: str, what: str) -> None:
    """Raise UserError unless a package that `what` needs is there. extra: the extra of llm3 that installs it."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:  # a folder of that name is no package, such as wandb's of runs
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

"""Plugins by name: a package is its own registry, and each of its modules is one plugin."""

import dataclasses
import importlib
import pkgutil
from types import ModuleType
from typing import Any

from llm3.errors import UserError, nearest


def plugin_names(folder: ModuleType) -> list[str]:
    """The names of the plugins of a package, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(folder.__path__))


def load_plugin(folder: ModuleType, name: str) -> ModuleType:
    """The plugin of this name. Raises UserError with the nearest names if there is none."""
    if name not in (known := plugin_names(folder)):
        kind = folder.__name__.rpartition(".")[2].removesuffix("s")
        raise UserError(f"{kind} {name!r}: {nearest(name, known)}")
    return importlib.import_module(f"{folder.__name__}.{name}")


def read_options(plugin: ModuleType, given: dict[str, Any], where: str) -> Any:
    """The `Options` of a plugin, built from a config; None if the plugin has none. Raises UserError naming `where`."""
    known = [field.name for field in dataclasses.fields(plugin.Options)] if hasattr(plugin, "Options") else []
    for name in given:
        if name not in known:
            raise UserError(f"{where}.{name}: no such option; {nearest(name, known)}")
    try:
        return plugin.Options(**given) if known else None
    except (TypeError, UserError) as error:
        raise UserError(f"{where}: {error}") from None

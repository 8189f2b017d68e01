"""The verb `check-plugin`: does a plugin hold to what llm3's own plugins hold to?"""

import ast
from pathlib import Path
from types import ModuleType
from typing import Any

from llm3 import config_folder, evals, objectives
from llm3.cli.plugin_checks import CHECKS, Failed, Subject
from llm3.errors import UserError, nearest
from llm3.registry import is_path, load_plugin, plugin_names, read_options

FOLDERS: dict[str, ModuleType] = {"objective": objectives, "evaluation": evals}


def check_plugin(name: str, kind: str = "", options: str = "") -> int:
    """Print each check of a plugin, and whether it holds; returns 0 if all do, else 2.

    name: as a config has it, of llm3 or an import path, which is looked for in this directory too. kind: "objective" or
    "evaluation"; "": as its names say. options: a Python dict. Raises UserError for a plugin that cannot be loaded.
    """
    if kind and kind not in FOLDERS:
        raise UserError(f"--kind={kind}: {nearest(kind, FOLDERS)}")
    config_folder.enter(Path.cwd())
    folder = FOLDERS[kind or kind_of(name)]
    plugin = load_plugin(folder, name)
    subject = Subject(plugin, read_options(plugin, options_of(options), "--options"))
    failed = 0
    for check in CHECKS[folder.__name__.rpartition(".")[2]]:
        says = (check.__doc__ or "").splitlines()[0]
        try:
            check(subject)
        except Failed as error:
            failed += 1
            print(f"FAILED  {says}\n        {error}")
        except Exception as error:
            failed += 1
            print(f"FAILED  {says}\n        {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        else:
            print(f"ok      {says}")
    print(f"{name}: " + (f"{failed} of the checks failed" if failed else "all checks hold"))
    return 2 if failed else 0


def kind_of(name: str) -> str:
    """The kind of a plugin by its names: an evaluation has `evaluate`, or a name of its folder. Raises UserError."""
    if not is_path(name):
        found = [kind for kind, folder in FOLDERS.items() if name in plugin_names(folder)]
        if len(found) > 1:
            raise UserError(f"check-plugin {name}: expected --kind={' or '.join(found)}: both have one of this name")
        return found[0] if found else "objective"
    try:
        load_plugin(objectives, name)
    except UserError as error:
        if "lacks" not in str(error):
            raise
        try:
            load_plugin(evals, name)
        except UserError:
            raise error from None
        return "evaluation"
    return "objective"


def options_of(text: str) -> dict[str, Any]:
    """The options of a flag, written as a Python dict. Raises UserError."""
    try:
        found = ast.literal_eval(text or "{}")
    except (ValueError, SyntaxError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"--options={text}: expected a dict, as in --options=\"{{'share': 0.2}}\"")
    return found

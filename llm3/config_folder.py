"""The folder of the config file is on the import path while the config is read and while its hooks are looked up.

So a config and the functions that it names can import their neighbours, whatever the working directory is. Like
`sys.path`, the folder belongs to the process; worker processes get it from the process that starts them.
"""

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_folder = ""  # absolute; "": no config file was read
_neighbours: set[str] = set()  # names of the modules that were imported from it


def current() -> str:
    """The folder of the config file that was read last; "" if there was none."""
    return _folder


def enter(folder: str | os.PathLike) -> None:
    """Make `folder` the config's folder. Modules from another config's folder are forgotten: names may be the same."""
    global _folder
    new = os.path.abspath(folder) if folder else ""
    if new != _folder:
        for name in _neighbours:
            sys.modules.pop(name, None)
        _neighbours.clear()
        _folder = new


@contextmanager
def on_path() -> Iterator[None]:
    """Put the config's folder first on the import path while this context lasts."""
    if not _folder or _folder in sys.path:
        yield
        return
    before = set(sys.modules)
    sys.path.insert(0, _folder)
    importlib.invalidate_caches()  # the folder may have changed within the resolution of its time
    try:
        yield
    finally:
        sys.path.remove(_folder)
        new = [name for name in sys.modules.keys() - before if name.partition(".")[0] != "llm3"]
        _neighbours.update(name for name in new if getattr(sys.modules[name], "__file__", "") == file_of(name))


def file_of(name: str) -> str | None:
    """The file that the config's folder has for a module of this name; None if it has none."""
    stem = os.path.join(_folder, *name.split("."))
    files = (os.path.join(stem, "__init__.py"), f"{stem}.py")
    return next((file for file in files if os.path.isfile(file)), None) if _folder and name else None

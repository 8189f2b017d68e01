"""Docstrings of the installed Python standard library, and of packages that llm3 depends on."""

import ast
import gc
import importlib
import importlib.util
import inspect
import re
import sysconfig
import types
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

PACKAGES = {
    "flax": "flax",
    "jax": "jax",
    "numpy": "numpy",
    "optax": "optax",
    "orbax": "orbax-checkpoint",
    "scipy": "scipy",
}  # import name -> distribution
TOOLS = {
    "absl": "absl-py",
    "datasets": "datasets",
    "huggingface_hub": "huggingface-hub",
    "jinja2": "jinja2",
    "rich": "rich",
}  # packages that llm3 installs and that have nothing to do with numbers

_NOT_DOCUMENTATION = re.compile(
    r"tests?|test_.*|.*_test|conftest|internal_test_util|site-packages|dist-packages|lib2to3|__p?hello__"
)
_C_MODULES = """
    _asyncio _bisect _blake2 _bz2 _codecs _collections _contextvars _csv _ctypes _datetime _decimal _elementtree
    _functools _hashlib _heapq _imp _io _json _locale _lzma _opcode _operator _pickle _queue _random _signal _socket
    _sqlite3 _sre _ssl _stat _struct _symtable _thread _tracemalloc _uuid _warnings _weakref _zoneinfo array atexit
    binascii builtins cmath errno faulthandler fcntl gc grp itertools marshal math mmap posix pwd pyexpat resource
    select sys syslog termios time unicodedata zlib
"""

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class Docstring(NamedTuple):
    """A docstring: its module, the qualified name of the documented object, and its cleaned text."""

    module: str
    name: str
    text: str


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """No garbage collection: parsing makes millions of objects without cycles, and collecting takes half the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def python_docstrings() -> Iterator[Docstring]:
    """The standard library: its Python files, its C modules, and the topics of `help()`."""
    yield from file_docstrings(Path(sysconfig.get_path("stdlib")), "")
    for name in _C_MODULES.split():
        with suppress(ImportError):  # not every platform has every module
            yield from _live_docstrings(importlib.import_module(name))
    topics = importlib.import_module("pydoc_data.topics").topics
    for topic, text in sorted(topics.items()):
        yield Docstring("pydoc_data.topics", topic, _clean(text))


def package_docstrings(packages: Iterable[str]) -> Iterator[Docstring]:
    """Packages by import name, found but not imported."""
    for package in packages:
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.submodule_search_locations is not None, f"{package} is not installed"
        for location in sorted(spec.submodule_search_locations):
            yield from file_docstrings(Path(location), package)


def file_docstrings(root: Path, package: str) -> Iterator[Docstring]:
    """The docstrings of all Python files below `root`, in the order of their paths, without tests."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if any(map(_NOT_DOCUMENTATION.fullmatch, parts)):
            continue
        module = ".".join(filter(None, (package, *parts))).removesuffix(".__init__")
        with warnings.catch_warnings(), suppress(SyntaxError, ValueError):  # templates are not quite Python
            warnings.simplefilter("ignore")
            yield from _tree_docstrings(ast.parse(path.read_bytes()), module, module)


def _tree_docstrings(node: ast.AST, module: str, name: str) -> Iterator[Docstring]:
    """The docstrings of a module, class or function, and of all definitions in a module or class, in source order."""
    if isinstance(node, _DOCUMENTED) and (text := ast.get_docstring(node)):
        yield Docstring(module, name, _clean(text))
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                yield from _tree_docstrings(child, module, f"{name}.{child.name}")
            case ast.If() | ast.Try() | ast.With():
                yield from _tree_docstrings(child, module, name)
            case ast.Expr(value=ast.Call(func=ast.Name(id=function)) as call) if function.startswith("add_newdoc"):
                yield from _added_docstring(call, module)


def _added_docstring(call: ast.Call, module: str) -> Iterator[Docstring]:
    """A docstring that numpy or scipy attaches to a C object, by a call like `add_newdoc("package", "object", "text")`.

    Yields nothing if the call has no literal name.
    """
    strings = [n.value for n in ast.walk(call) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    names = [string for string in strings if re.fullmatch(r"[\w.]+", string)]
    if not names:
        return
    library = module.partition(".")[0]
    package = [] if names[0].partition(".")[0] == library else [module.rpartition(".")[0]]
    yield Docstring(module, ".".join(package + names), _clean(max(strings, key=len)))


def _live_docstrings(module: types.ModuleType) -> Iterator[Docstring]:
    """The docstrings of an imported module, its functions, its classes and their members, in the order of names."""
    name = module.__name__
    found: list[tuple[str, object]] = [(name, module)]
    for key, value in sorted(vars(module).items()):
        if isinstance(value, type) or inspect.isroutine(value):
            found.append((f"{name}.{key}", value))
        if isinstance(value, type):
            members = sorted(vars(value).items())
            found += [
                (f"{name}.{key}.{k}", v) for k, v in members if inspect.isroutine(v) or inspect.isdatadescriptor(v)
            ]
    for qualified, value in found:
        text = getattr(value, "__doc__", None)
        if isinstance(text, str) and text.strip():
            yield Docstring(name, qualified, _clean(text))


def _clean(text: str) -> str:
    return inspect.cleandoc(text).strip().encode(errors="backslashreplace").decode()

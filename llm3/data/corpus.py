"""The embedded corpus: documentation that is on every machine that runs llm3, so that a first run downloads nothing.

`python`: docstrings of Python's standard library and the language reference's topics (general text).
`numerical`: docstrings of numpy, scipy, jax, flax, optax and orbax (domain text).
`numerical_task`: single docstrings of `numerical`, the names of packages masked, labelled with the sub-package that
they describe.

A module belongs to one split, and a text that several modules share is kept once, so splits share neither modules nor
texts. The task has the same split of modules as `numerical`.
"""

import ast
import gc
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import platform
import re
import shutil
import sysconfig
import tempfile
import types
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import datasets
import pyarrow as pa

from llm3.config import one_of
from llm3.errors import UserError

EXTRACTION = 1  # part of the key of what is kept on disk: raise it when anything below changes the result

SPLITS = ("train", "validation", "test")
HELD_OUT_SHARE = {"python": 0.05, "numerical": 0.15}  # of the text, for validation and for test each
DOCUMENT_CHARACTERS = 6000  # a document is a run of a module's docstrings of about this size
EXAMPLE_CHARACTERS = (200, 800)  # shorter docstrings are no examples; longer ones are cut
EXAMPLES_A_CLASS = {"train": 240, "validation": 48, "test": 48}  # the most; some classes have fewer
CLASSES = (
    "flax.linen",
    "flax.nnx",
    "jax.lax",
    "jax.numpy",
    "jax.scipy",
    "numpy.lib",
    "optax",
    "orbax.checkpoint",
    "scipy.optimize",
    "scipy.signal",
    "scipy.sparse",
    "scipy.stats",
)
PACKAGES = {
    "flax": "flax",
    "jax": "jax",
    "numpy": "numpy",
    "optax": "optax",
    "orbax": "orbax-checkpoint",
    "scipy": "scipy",
}  # import name -> distribution

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

MASK = "[name]"
_MASKED_WORDS = (
    "checkpoint|cluster|constants|core|fft|integrate|interpolate|io|jnp|jsp|lax|lib|linalg|linen|ma|ndimage|nn|nnx|np|"
    "ocp|odr|optimize|polynomial|random|signal|sp|sparse|spatial|special|stats"
)
_NAMES = re.compile(rf"(?<![a-z0-9])(?:{_MASKED_WORDS})(?![a-z0-9])|{'|'.join(PACKAGES)}", re.IGNORECASE)


class Docstring(NamedTuple):
    """One docstring: the module that it was found in, the qualified name of what it describes, its cleaned text."""

    module: str
    name: str
    text: str


def load(name: str, split: str, cache_dir: Path) -> datasets.Dataset:
    """One split ("train", "validation" or "test") of an embedded corpus: a column "text"; for the task also "label".

    Extracted at the first call (some seconds) and kept in `cache_dir` for these versions of Python and the packages.
    Raises UserError for an unknown name or split, or a package that is not installed.
    """
    one_of("sources.path builtin:", name, ("numerical", "numerical_task", "python"))
    one_of("sources split", split, SPLITS)
    family = name.removesuffix("_task")
    directory = Path(cache_dir) / f"builtin-{family}-{_version_key(family)}"
    if not directory.exists():
        _extract_into(directory, family)
    return datasets.Dataset.from_file(str(directory / f"{name}-{split}.arrow"))


def _version_key(family: str) -> str:
    versions = [f"extraction {EXTRACTION}", f"python {platform.python_version()} {sysconfig.get_platform()}"]
    if family == "numerical":
        versions += [f"{package} {_version(distribution)}" for package, distribution in PACKAGES.items()]
    return hashlib.sha256("\n".join(versions).encode()).hexdigest()[:16]


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"builtin:numerical reads the documentation of {distribution}, which is not installed"
        ) from None


def _extract_into(directory: Path, family: str) -> None:
    """Write all splits of a family to `directory`: whole or not at all, byte for byte the same each time."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=directory.parent, prefix=directory.name + "."))
    try:
        with _no_garbage_collection():
            docstrings = without_repeats(python_docstrings() if family == "python" else numerical_docstrings())
        splits = split_modules(docstrings, HELD_OUT_SHARE[family])
        examples = without_repeats(task_examples(docstrings)) if family == "numerical" else []
        for split in SPLITS:
            inside = [docstring for docstring in docstrings if splits[docstring.module] == split]
            _write_arrow(temporary / f"{family}-{split}.arrow", {"text": documents(inside)})
            chosen = capped([e for e in examples if splits[e.module] == split], EXAMPLES_A_CLASS[split])
            if chosen:
                columns = {"text": [e.text for e in chosen], "label": [subpackage(e.module) for e in chosen]}
                _write_arrow(temporary / f"{family}_task-{split}.arrow", columns)
        with suppress(OSError):  # another process has finished the same corpus first
            os.rename(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _no_garbage_collection():
    """Parsing makes millions of small objects and no circles; collecting them takes half of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _write_arrow(path: Path, columns: dict[str, list[str]]) -> None:
    table = pa.table({name: pa.array(column, pa.string()) for name, column in columns.items()})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def python_docstrings() -> Iterator[Docstring]:
    """The standard library: its Python files, the modules written in C, and the topics of `help()`."""
    yield from _file_docstrings(Path(sysconfig.get_path("stdlib")), "")
    for name in _C_MODULES.split():
        with suppress(ImportError):  # not every platform has every module
            yield from _live_docstrings(importlib.import_module(name))
    topics = importlib.import_module("pydoc_data.topics").topics
    for topic, text in sorted(topics.items()):
        yield Docstring("pydoc_data.topics", topic, _clean(text))


def numerical_docstrings() -> Iterator[Docstring]:
    """The numerical packages, found but not imported."""
    for package in PACKAGES:
        for location in sorted(importlib.util.find_spec(package).submodule_search_locations):
            yield from _file_docstrings(Path(location), package)


def _file_docstrings(root: Path, package: str) -> Iterator[Docstring]:
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if any(map(_NOT_DOCUMENTATION.fullmatch, parts)):
            continue
        module = ".".join(filter(None, (package, *parts))).removesuffix(".__init__")
        with warnings.catch_warnings(), suppress(SyntaxError, ValueError):  # templates are not quite Python
            warnings.simplefilter("ignore")
            yield from _tree_docstrings(ast.parse(path.read_bytes()), module, module)


def _tree_docstrings(node: ast.AST, module: str, name: str) -> Iterator[Docstring]:
    """The docstrings of a module, class or function and of what a module or class defines, in source order."""
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
            case ast.Expr(value=ast.Call(func=ast.Name(id=function))) if function.startswith("add_newdoc"):
                yield _added_docstring(child.value, module)


def _added_docstring(call: ast.Call, module: str) -> Docstring:
    """What numpy and scipy attach to objects written in C: `add_newdoc("package", "object", "text")`, or nearly so."""
    strings = [n.value for n in ast.walk(call) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    names = [string for string in strings if re.fullmatch(r"[\w.]+", string)]
    library = module.partition(".")[0]
    package = [] if names[0].partition(".")[0] == library else [module.rpartition(".")[0]]
    return Docstring(module, ".".join(package + names), _clean(max(strings, key=len)))


def _live_docstrings(module: types.ModuleType) -> Iterator[Docstring]:
    """The docstrings of an imported module, its functions, its classes and their members, by name."""
    name = module.__name__
    found = [(name, module)]
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


def _normal(text: str) -> str:
    return " ".join(text.lower().split())


def without_repeats(docstrings: Iterable[Docstring]) -> list[Docstring]:
    """The first docstring of each text, but for letter case and white space; empty ones are dropped."""
    first: dict[str, Docstring] = {}
    for docstring in docstrings:
        first.setdefault(_normal(docstring.text), docstring)
    first.pop("", None)
    return list(first.values())


def split_modules(docstrings: Iterable[Docstring], held_out_share: float) -> dict[str, str]:
    """Which split each module belongs to.

    In each sub-package by itself, modules in the order of their hashes fill validation and test up to
    `held_out_share` of the text each; what fits in neither trains. A docstring counts as much text as its example.
    """
    sizes: dict[str, dict[str, int]] = {}
    for docstring in docstrings:
        modules = sizes.setdefault(subpackage(docstring.module), {})
        modules[docstring.module] = modules.get(docstring.module, 0) + min(len(docstring.text), EXAMPLE_CHARACTERS[1])
    splits = {}
    for modules in sizes.values():
        room = dict.fromkeys(("validation", "test"), held_out_share * sum(modules.values()))
        for module in sorted(modules, key=_hash):
            fits = [split for split in room if modules[module] <= room[split]]
            splits[module] = max(fits, key=room.get, default="train")
            if fits:
                room[splits[module]] -= modules[module]
    return splits


def subpackage(module: str) -> str:
    """The public sub-package that a module's documentation is about: "jax._src.numpy.ufuncs" -> "jax.numpy".

    All of optax is one; so is the standard library.
    """
    package, *inside = module.split(".")
    if package == "optax":
        return package
    if package not in PACKAGES:
        return "python"
    return ".".join([package, *[part for part in inside if not part.startswith("_")][:1]])


def documents(docstrings: Iterable[Docstring]) -> list[str]:
    """Texts of about DOCUMENT_CHARACTERS: runs of docstrings of one module, each under its qualified name."""
    texts: list[str] = []
    last_module = None
    for module, name, text in docstrings:
        entry = f"{name}\n\n{text}\n"
        if module == last_module and len(texts[-1]) + len(entry) <= DOCUMENT_CHARACTERS:
            texts[-1] += "\n" + entry
        else:
            texts.append(entry)
        last_module = module
    return texts


def task_examples(docstrings: Iterable[Docstring]) -> Iterator[Docstring]:
    """The docstrings of CLASSES that are long enough, cut at a word, with the names of all packages masked."""
    shortest, longest = EXAMPLE_CHARACTERS
    for module, name, text in docstrings:
        if subpackage(module) in CLASSES:
            masked = mask_names(text)
            if len(masked) > longest:
                masked = masked[:longest].rpartition(" ")[0]
            if len(masked) >= shortest:
                yield Docstring(module, name, masked)


def mask_names(text: str) -> str:
    """Put MASK for words that name a sub-package or are its usual abbreviation, and for a library's name anywhere."""
    return _NAMES.sub(MASK, text)


def capped(examples: list[Docstring], most: int) -> list[Docstring]:
    """At most `most` examples of each class: those with the smallest hashes, in their old order."""
    kept: dict[str, int] = {}
    chosen = set()
    for example in sorted(examples, key=lambda e: _hash(e.text)):
        label = subpackage(example.module)
        if kept.get(label, 0) < most:
            kept[label] = kept.get(label, 0) + 1
            chosen.add(example.text)
    return [example for example in examples if example.text in chosen]


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()

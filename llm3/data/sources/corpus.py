"""The built-in corpus: documentation that every installation of llm3 has, so that a first run downloads nothing.

`python`: docstrings of Python's standard library and the language reference's topics (general text).
`numerical`: docstrings of numpy, scipy, jax, flax, optax and orbax (domain text).
`tools`: docstrings of absl, datasets, huggingface_hub, jinja2 and rich (text of another domain).
`numerical_task`: single docstrings of `numerical` with package names masked; the label is their sub-package.

Splits share neither modules nor texts: a module belongs to one split, and a text that several modules share is kept
once. `numerical_task` splits modules as `numerical` does.
"""

import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import datasets
import pyarrow as pa

from llm3.data.sources.docstrings import (
    PACKAGES,
    TOOLS,
    Docstring,
    no_garbage_collection,
    package_docstrings,
    python_docstrings,
)
from llm3.errors import UserError, one_of

EXTRACTION = 1  # part of the key of the files on disk; raise it when this file or docstrings.py changes the result

SPLITS = ("train", "validation", "test")
HELD_OUT_SHARE = {"python": 0.05, "numerical": 0.15, "tools": 0.05}  # of the text, for validation, and again for test
DOCUMENT_CHARACTERS = 6000  # documents are runs of a module's docstrings of about this size
EXAMPLE_CHARACTERS = (200, 800)  # shorter docstrings are skipped, longer ones are cut
EXAMPLES_A_CLASS = {"train": 240, "validation": 48, "test": 48}  # at most; some classes have fewer
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
MASK = "[name]"
_MASKED_WORDS = (
    "checkpoint|cluster|constants|core|fft|integrate|interpolate|io|jnp|jsp|lax|lib|linalg|linen|ma|ndimage|nn|nnx|np|"
    "ocp|odr|optimize|polynomial|random|signal|sp|sparse|spatial|special|stats"
)
_NAMES = re.compile(rf"(?<![a-z0-9])(?:{_MASKED_WORDS})(?![a-z0-9])|{'|'.join(PACKAGES)}", re.IGNORECASE)


def load_corpus(name: str, split: str, cache_dir: Path) -> datasets.Dataset:
    """One split ("train", "validation" or "test") of a built-in corpus: column "text", and "label" for the task.

    The first call extracts the corpus (some seconds) and stores it in `cache_dir`, keyed by the versions of Python and
    the packages. Raises UserError for an unknown name or split, or a package that is not installed.
    """
    one_of("sources.path builtin:", name, ("numerical", "numerical_task", "python", "tools"))
    one_of("sources split", split, SPLITS)
    family = name.removesuffix("_task")
    directory = Path(cache_dir) / f"builtin-{family}-{_version_key(family)}"
    if not directory.exists():
        _extract_into(directory, family)
    return datasets.Dataset.from_file(str(directory / f"{name}-{split}.arrow"))


def _version_key(family: str) -> str:
    versions = [f"extraction {EXTRACTION}", f"python {platform.python_version()} {sysconfig.get_platform()}"]
    packages = {"numerical": PACKAGES, "tools": TOOLS}.get(family, {})
    versions += [f"{package} {_version(family, distribution)}" for package, distribution in packages.items()]
    return hashlib.sha256("\n".join(versions).encode()).hexdigest()[:16]


def _version(family: str, distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"builtin:{family} reads the documentation of {distribution}, which is not installed") from None


def _extract_into(directory: Path, family: str) -> None:
    """Write all splits of a family to `directory`, complete or not at all, with the same bytes each time."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    holder = Path(tempfile.mkdtemp(dir=directory.parent, prefix=directory.name + "."))
    temporary = holder / directory.name  # the holder lacks ordinary permissions
    try:
        temporary.mkdir()
        with no_garbage_collection():
            docstrings = without_repeats(_docstrings(family))
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
        shutil.rmtree(holder, ignore_errors=True)


def _docstrings(family: str) -> Iterator[Docstring]:
    if family == "python":
        return python_docstrings()
    return package_docstrings(PACKAGES if family == "numerical" else TOOLS)


def _write_arrow(path: Path, columns: dict[str, list[str]]) -> None:
    table = pa.table({name: pa.array(column, pa.string()) for name, column in columns.items()})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def _normal(text: str) -> str:
    return " ".join(text.lower().split())


def without_repeats(docstrings: Iterable[Docstring]) -> list[Docstring]:
    """The first docstring of each text, ignoring letter case and white space. Empty docstrings are dropped."""
    first: dict[str, Docstring] = {}
    for docstring in docstrings:
        first.setdefault(_normal(docstring.text), docstring)
    first.pop("", None)
    return list(first.values())


def split_modules(docstrings: Iterable[Docstring], held_out_share: float) -> dict[str, str]:
    """{module: its split}.

    Within each sub-package, modules in the order of their hashes fill validation and test, up to `held_out_share` of
    the text each; the other modules are for training. A docstring counts with the length of its example.
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
            splits[module] = max(fits, key=room.__getitem__, default="train")
            if fits:
                room[splits[module]] -= modules[module]
    return splits


def subpackage(module: str) -> str:
    """The public sub-package that a module documents: "jax._src.numpy.ufuncs" -> "jax.numpy".

    optax counts as one sub-package, and so does the standard library.
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
    """Replace names and usual abbreviations of sub-packages by MASK, and names of libraries even inside words."""
    return _NAMES.sub(MASK, text)


def capped(examples: list[Docstring], most: int) -> list[Docstring]:
    """At most `most` examples of each class: the ones with the smallest hashes, in their original order."""
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

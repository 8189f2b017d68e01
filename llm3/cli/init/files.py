"""Files of a user: which format they have, which of them are held out, and their rows."""

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from llm3.config.data_schema import SourceConfig
from llm3.data.formats import BadRow
from llm3.data.sources.readers import BUILTIN, open_reader
from llm3.errors import UserError, counted, listed, nearest
from llm3.files import local_path

ENDINGS = {  # ending of a file's name -> `path` of a source
    **dict.fromkeys((".jsonl", ".json", ".ndjson"), "json"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    **dict.fromkeys((".txt", ".md", ".text"), "text"),
    ".parquet": "parquet",
    ".arrow": "arrow",
}
COMPRESSED = (".gz", ".bz2", ".xz")
SPLITS = {  # word in a file's name -> split
    "train": "train",
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    "test": "test",
}
MOST_ROWS = 50_000  # rows that are looked at
MOST_BYTES = 64_000_000  # of their contents
PARAGRAPHS = 10  # blank lines from which on plain text is read by paragraphs
WHOLE_FILES = 20  # plain text files from which on a document is a file


class Look(NamedTuple):
    """Files and their first rows.

    fields: of a source that reads them. splits: those that have files of their own. complete: whether `rows` are all.
    """

    fields: dict[str, Any]
    splits: tuple[str, ...]
    rows: list[dict[str, Any]]
    complete: bool


def look_at(given: str, flag: str) -> Look:
    """The files that a flag names (a file, a folder, or `builtin:NAME`). Raises UserError."""
    if given.startswith(BUILTIN):
        return _read({"path": given}, ("train", "validation"))
    path = local_path(given, flag)
    if not path.exists():
        beside = sorted(map(str, path.parent.iterdir())) if path.parent.is_dir() else []
        raise UserError(f"{flag}={given}: no such file or folder; {nearest(given, beside)}")
    kind, files = (_kind(path), [path]) if path.is_file() else _files_of(path, flag)
    if kind is None:
        raise UserError(f"{flag}={given}: expected a file that ends in {', '.join(ENDINGS)}, or a folder of them")
    by_split = _by_split(files) if len(files) > 1 else {}
    names = {split: _names(path, each, files) for split, each in by_split.items()} or _names(path, files, files)
    fields: dict[str, Any] = {"path": kind, "data_files": names}
    if kind == "text":
        fields["sample_by"] = _sample_by(files)
    return _read(fields, tuple(by_split))


def _kind(path: Path) -> str | None:
    endings = [each.lower() for each in path.suffixes]
    return ENDINGS.get(next((each for each in reversed(endings) if each not in COMPRESSED), ""))


def _files_of(folder: Path, flag: str) -> tuple[str | None, list[Path]]:
    """The files of a folder, all of one format."""
    files = sorted(each for each in folder.iterdir() if each.is_file() and not each.name.startswith("."))
    kinds: dict[str, list[Path]] = {}
    for file in files:
        if kind := _kind(file):
            kinds.setdefault(kind, []).append(file)
    if len(kinds) > 1:
        shown = "; ".join(f"{kind}: {listed((each.name for each in found), 2)}" for kind, found in kinds.items())
        raise UserError(f"{flag}={folder}: holds files of several formats ({shown}): name one file, or move the others")
    return next(iter(kinds.items()), (None, []))


def _by_split(files: list[Path]) -> dict[str, list[Path]]:
    """{split: its files} if the names tell them apart, else {}."""
    found: dict[str, list[Path]] = {}
    for file in files:
        words = file.name.lower().replace("-", ".").replace("_", ".").split(".")
        found.setdefault(next((SPLITS[word] for word in words if word in SPLITS), "train"), []).append(file)
    return found if "train" in found and len(found) > 1 else {}


def _names(path: Path, wanted: list[Path], files: list[Path]) -> str | list[str]:
    """The shortest `data_files` for some of the files at `path`."""
    endings = {"".join(file.suffixes[-1:]) for file in wanted}
    if len(wanted) > 1 and len(wanted) == len(files) and len(endings) == 1:
        return str(path / f"*{endings.pop()}")
    return str(wanted[0]) if len(wanted) == 1 else [str(each) for each in wanted]


def _sample_by(files: list[Path]) -> str:
    """What a document of these plain texts is: a file of many, a paragraph where there are any, else a line."""
    if len(files) >= WHOLE_FILES:
        return "document"
    with open(files[0], "rb") as file:
        lines = itertools.pairwise(line.strip() for line in itertools.islice(file, 10_000))
        return "paragraph" if sum(bool(before) and not line for before, line in lines) >= PARAGRAPHS else "line"


def _read(fields: dict[str, Any], splits: tuple[str, ...]) -> Look:
    """The first rows of the train split. Raises UserError."""
    files = fields.get("data_files")
    train = files["train"] if isinstance(files, dict) else files
    source = SourceConfig(**fields | ({"data_files": {"train": train}} if train else {}), streaming=bool(train))
    with tempfile.TemporaryDirectory(prefix="llm3-init.") as folder:
        rows, complete = _first(open_reader(source, "train", Path(folder)).head())
    if not rows:
        raise UserError(f"{train}: no usable rows")
    return Look(fields, splits, rows, complete)


def _first(numbered: Iterator[tuple[int, Any]]) -> tuple[list[dict[str, Any]], bool]:
    rows: list[dict[str, Any]] = []
    read = 0
    for _, row in numbered:
        if len(rows) >= MOST_ROWS or read >= MOST_BYTES:
            return rows, False
        if not isinstance(row, BadRow):
            rows.append(row)
            read += sum(len(str(value)) for value in row.values())
    return rows, True


def counted_rows(look: Look) -> str:
    """The number of rows, or that there are more than were looked at."""
    return ("" if look.complete else "more than ") + counted(len(look.rows), "row")

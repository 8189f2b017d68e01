"""Splits by the names of files and folders, with the words that the datasets library looks for in a folder.

Imports little, so that files of several splits are seen before anything slow begins.
"""

import dataclasses
import glob
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm3.config.data_schema import SourceConfig
from llm3.errors import UserError, listed, say

WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SEPARATORS = "-._ 0-9"  # around a word, or the beginning or the end of a name
PATTERNS = {
    split: re.compile(rf"(?:^|[{SEPARATORS}])(?:{'|'.join(words)})(?:[{SEPARATORS}]|$)", re.IGNORECASE)
    for split, words in WORDS.items()
}
SHOWN = 8  # files of a split that a message lists
FILE_LOADERS = ("arrow", "csv", "json", "parquet", "text")  # builders of `datasets` for local files


def expanded(source: SourceConfig) -> SourceConfig:
    """The source with a leading "~" of its paths expanded."""

    def one(value: Any) -> Any:
        if isinstance(value, dict):
            return {split: one(each) for split, each in value.items()}
        if isinstance(value, list):
            return [one(each) for each in value]
        return os.path.expanduser(value) if isinstance(value, str) else value

    paths = {field: one(getattr(source, field)) for field in ("path", "data_files", "data_dir", "drop")}
    return dataclasses.replace(source, **paths)


def source_name(source: SourceConfig) -> str:
    """The name of a source in messages."""
    parts = (source.path, source.name, source.data_dir, _shortened(source.data_files))
    return " ".join(str(part) for part in parts if part)


def _shortened(files: Any) -> Any:
    """`data_files` with the beginnings of long lists."""
    if isinstance(files, dict):
        return {split: _shortened(each) for split, each in files.items()}
    return files if not isinstance(files, list) or len(files) <= 4 else [*files[:3], f"and {len(files) - 3:,} more"]


def splits_of(name: str) -> frozenset[str]:
    """The splits that a path names: "a/train-01.jsonl" names "train", and "a/b.jsonl" none."""
    return frozenset(s for s, pattern in PATTERNS.items() if any(map(pattern.search, Path(name).parts)))


def with_named_splits(source: SourceConfig, name: str) -> SourceConfig:
    """The source with files of several splits as {split: files}, where `data_files` does not say which are which.

    Files of one split, or without one, are all of the train split. Prints which files became which. name: the source's
    in messages. Raises UserError if only some files name a split, or one names several.
    """
    files = source.data_files
    if not isinstance(files, str | list) or not files or not _is_local(source):
        return source
    patterns = [files] if isinstance(files, str) else files
    folder = Path("" if source.path in FILE_LOADERS else source.path, source.data_dir or "")
    found = list(dict.fromkeys(file for pattern in patterns for file in _matching(pattern, folder)))
    by_split = named_splits(found, name)
    if by_split is None:
        return source
    say_splits(by_split, name)
    is_text = source.path == "text" or all(file.endswith(".txt") for file in found)
    if is_text and source.sample_by is None and any(map(glob.has_magic, patterns)):
        say(f"source {name}: each file is a document; sample_by can be 'line', 'paragraph' or 'document' (a file)")
        source = dataclasses.replace(source, sample_by="document")
    return dataclasses.replace(source, data_files=by_split)


def named_splits(files: Sequence[str], name: str) -> dict[str, list[str]] | None:
    """{split: files}; None if all files are of the train split, or all of one split, by their names.

    Raises UserError as `with_named_splits`.
    """
    if not files:
        return None
    above = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])
    named = {file: splits_of(os.path.relpath(file, above)) for file in files}
    kinds = set(named.values())
    if len(kinds) < 2 or kinds <= {frozenset(), frozenset({"train"})}:
        return None
    by_split: dict[str, list[str]] = {}
    for file, splits in named.items():
        by_split.setdefault(next((s for s in WORDS if s in splits), "train"), []).append(file)
    by_split = {split: by_split[split] for split in WORDS if split in by_split}
    if all(len(splits) == 1 for splits in kinds):
        return by_split
    unclear = [file for file, splits in named.items() if len(splits) != 1]
    what = "names no split" if not named[unclear[0]] else f"names {' and '.join(sorted(named[unclear[0]]))}"
    clear = listed([file for file, splits in named.items() if len(splits) == 1], 3)
    more = f", like {len(unclear) - 1:,} more" if len(unclear) > 1 else ""
    raise UserError(
        f"source {name}: {unclear[0]} {what}{more}, but other files do ({clear}): say which files are of which split, "
        f"as in {_line(by_split)}"
    )


def check_folder(found: Mapping[str, Sequence[str]], folder: Path, name: str) -> None:
    """Print the splits that the datasets library found in a folder, {split: files}, if there are several.

    Raises UserError for a file of the same kind that would not be read, and for names that differ from what it looks
    for in letter case only. A README may say otherwise, and is believed.
    """
    if (folder / "README.md").exists() or not found or set(found) - set(WORDS):
        return
    used = {os.path.abspath(file) for files in found.values() for file in files}
    kinds = {Path(file).suffix for file in used}
    every = [os.path.abspath(path) for path in sorted(folder.rglob("*")) if path.suffix in kinds and path.is_file()]
    every = [file for file in every if not re.search(r"/[.]|/__", file.removeprefix(os.path.abspath(folder)))]
    unread = [file for file in every if file not in used]
    by_split = {split: [os.path.relpath(file, folder) for file in files] for split, files in found.items()}
    if unread:
        unread = [os.path.relpath(file, folder) for file in unread]
        by_split["train"] = [*by_split.get("train", []), *unread]
        raise UserError(
            f"source {name}: {unread[0]} names no split, but other files do, and the datasets library would not read "
            f"it: say which files are of which split, as in {_line(by_split)}"
        )
    if len(found) > 1:
        say_splits(by_split, name)
    elif (named := named_splits(by_split["train"], name) if "train" in found else None) is not None:
        raise UserError(
            f"source {name}: the datasets library finds splits by names in lower case only: say which files are of "
            f"which split, as in {_line(named)}"
        )


def say_splits(by_split: Mapping[str, Iterable[str]], name: str) -> None:
    """Print which files are of which split."""
    names = (f"{split}: {listed(map(os.path.basename, files), 3)}" for split, files in by_split.items())
    say(f"source {name}: split by the names of its files: {'; '.join(names)}")


def _line(by_split: Mapping[str, list[str]]) -> str:
    """The field to paste into a config; long lists are cut."""

    def written(files: list[str]) -> str:
        return repr(files[0] if len(files) == 1 else [*files[:SHOWN], *["..."][: max(len(files) - SHOWN, 0)]])

    ordered = (split for split in WORDS if split in by_split)
    return f"data_files=dict({', '.join(f'{split}={written(by_split[split])}' for split in ordered)})"


def _is_local(source: SourceConfig) -> bool:
    return source.path in FILE_LOADERS or Path(source.path).is_dir()


def _matching(pattern: str, folder: Path) -> list[str]:
    """The files that a name or a pattern in `data_files` stands for, relative to the folder."""
    if "://" in pattern:
        return []
    if (folder / pattern).exists() or not glob.has_magic(pattern):
        return [pattern]
    found = sorted(glob.glob(pattern, root_dir=folder, recursive=True))
    return [each for each in found if (folder / each).is_file()]

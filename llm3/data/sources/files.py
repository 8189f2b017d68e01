"""The files that llm3 reads itself: JSON, delimited and plain text, on this machine or behind an address.

`datasets` finds the files of a split, downloads and unpacks them. It reads them only if their folder describes them.
"""

import dataclasses
import difflib
import glob
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import fsspec

from llm3.config.data_schema import SourceConfig
from llm3.data.sources.delimited import Delimited
from llm3.data.sources.digests import content_digest
from llm3.data.sources.json_arrays import JsonArrays, is_json_array
from llm3.data.sources.lines import Lines, is_archive
from llm3.data.sources.plain_text import Paragraphs, WholeFiles
from llm3.data.sources.slices import Slices, sliced
from llm3.data.sources.split_names import source_name
from llm3.errors import UserError, nearest, say

FIELDS = {"delimiter": "csv", "quote": "csv", "sample_by": "text"}  # field of a source -> the only files that it suits
NAMES = {"name", "version", "data_dir", "data_files", "description"}  # options of `datasets` that name files


FileReader = Lines | WholeFiles | Slices


def open_files(
    builder: datasets.DatasetBuilder, source: SourceConfig, split: str, root: Path, cache_dir: Path
) -> FileReader | None:
    """The reader of a split, or of parts of splits ("train[:90%]"); None if `datasets` has to read it.

    root: folder for downloaded and unpacked files. cache_dir: keeps digests of files. Raises UserError for an
    unknown split, a missing or an empty file.
    """
    kind = builder.info.builder_name
    check_kind(source, kind)
    if kind not in ("csv", "json", "text") or _is_described(builder):
        return None
    splits = {str(name): [str(file) for file in files] for name, files in builder.config.data_files.items()}
    if split in splits:
        return _reader(builder, source, split, splits[split], root, cache_dir)
    if not re.search(r"[\[+]", split) and split != "all":
        raise UserError(unknown_split(source, split, split, list(splits)))
    readers = {name: _reader(builder, source, name, files, root, cache_dir) for name, files in splits.items()}
    own = {name: reader for name, reader in readers.items() if reader is not None}
    return sliced(split, own) if len(own) == len(splits) else None


def check_kind(source: SourceConfig, kind: str) -> None:
    """Raise UserError for a field that does not suit files of this kind."""
    for field, only in FIELDS.items():
        if getattr(source, field) is not None and kind != only:
            raise UserError(
                f"source {source_name(source)}: {field}={getattr(source, field)!r}: its files are {kind}; "
                f"expected {only} files with this field"
            )


def _is_described(builder: datasets.DatasetBuilder) -> bool:
    """Whether the README of the files says how to read them, and not only which files there are."""
    if builder.info.features is not None:
        return True
    return bool(set_options(builder.config).keys() - {"sep", "delimiter"})


def set_options(config: datasets.BuilderConfig) -> dict[str, Any]:
    """The options of a config of `datasets` that are not its defaults, but those that name its files."""
    names = [field.name for field in dataclasses.fields(config) if field.name not in NAMES]
    return {name: getattr(config, name) for name in names if getattr(config, name) != getattr(type(config)(), name)}


def _reader(
    builder: datasets.DatasetBuilder, source: SourceConfig, split: str, files: list[str], root: Path, cache_dir: Path
) -> Lines | WholeFiles | None:
    kind = builder.info.builder_name
    if kind != "csv" and not all(map(os.path.isfile, files)):
        return None
    sample_by = _sample_by(source, split) if kind == "text" else None
    for file in files:
        if os.path.isfile(file):
            check_file(Path(file), source, may_be_empty=sample_by == "document")
    paths = tuple(_unpacked(files, source, root, cache_dir))
    settings = (source.max_row_bytes, _content_key(paths, cache_dir))
    if kind == "csv":
        declared = None if builder.config.sep == "," else builder.config.sep
        quote = '"' if source.quote is None else source.quote
        return Delimited(paths, False, *settings, delimiter=source.delimiter or declared, quote=quote)
    if kind == "text":
        if sample_by == "document":
            return WholeFiles(paths, *settings)
        return (Paragraphs if sample_by == "paragraph" else Lines)(paths, False, *settings)
    return (JsonArrays if any(map(is_json_array, paths)) else Lines)(paths, True, *settings)


def _sample_by(source: SourceConfig, split: str) -> str:
    """What a document of plain text is. Says it if the config does not."""
    if source.sample_by:
        return source.sample_by
    files = source.data_files.get(split) if isinstance(source.data_files, dict) else source.data_files
    patterns = [Path(source.data_dir or "", each) for each in flat(files)]
    named = patterns and all(path.exists() or not glob.has_magic(str(path)) for path in patterns)
    each = "line" if named else "file"
    say_sample_by(source, each)
    return "line" if each == "line" else "document"


def say_sample_by(source: SourceConfig, each: str) -> None:
    """Say what a document of plain text is, where the config does not."""
    say(
        f"source {source_name(source)}: each {each} is a document; sample_by can be 'line', 'paragraph' or 'document' "
        "(a file)"
    )


def _unpacked(files: list[str], source: SourceConfig, root: Path, cache_dir: Path) -> list[str]:
    """The files on this machine, archives unpacked; streamed files stay where they are."""
    here = [os.path.isfile(file) for file in files]
    if (source.streaming and not any(here)) or (all(here) and not any(map(is_archive, files))):
        return files
    local = [file for file in files if os.path.isfile(file)]
    content = content_digest(local, cache_dir)[:16] if local else ""  # `datasets` knows an archive by its path only
    config = datasets.DownloadConfig(cache_dir=str(root / "downloads" / content))
    manager = datasets.DownloadManager(download_config=config)
    return list(manager.iter_files(manager.download_and_extract(files)))


def _content_key(files: Sequence[str], cache_dir: Path) -> str:
    """Identifies the content of files: their digest, or what their server says of them."""
    if not any("://" in file for file in files):
        return content_digest(files, cache_dir)
    systems = [(file, *fsspec.core.url_to_fs(file)) for file in files]
    return json.dumps([[file, system.ukey(path)] for file, system, path in systems])


def unknown_split(source: SourceConfig, split: str, unknown: str, valid: list[str]) -> str:
    """The message for a split that a source does not have."""
    hint = " (or validation='' and validation_share=0.05)" if split == source.validation else ""
    return f"source {source_name(source)}: unknown split {unknown!r}: {nearest(unknown, valid)}{hint}"


def flat(data_files: Any) -> Iterable[str]:
    """The file names and patterns of a config's `data_files`."""
    if isinstance(data_files, dict):
        return [file for files in data_files.values() for file in flat(files)]
    return [data_files] if isinstance(data_files, str) else list(data_files or ())


def check_file(path: Path, source: SourceConfig, *, may_be_empty: bool = False) -> None:
    """Raise UserError for a file that does not exist or is empty."""
    if not path.is_file():
        if not path.parent.is_dir():
            raise UserError(
                f"source {source.path}: {path} does not exist, nor does its folder {path.parent.absolute()}"
            )
        if path.is_dir():
            raise UserError(
                f"source {source.path}: {path} is a folder: expected data_dir={str(path)!r} for all its files, or a "
                f"pattern such as data_files={str(path / '*')!r}"
            )
        raise UserError(f"source {source.path}: {path} does not exist: {nearest_beside(path)}")
    if not (may_be_empty or path.stat().st_size):
        raise UserError(f"source {source.path}: {path} is empty")


def nearest_beside(path: Path) -> str:
    """The end of an error message: names in the folder of a missing path, the nearest first."""
    names = sorted(entry.name for entry in path.parent.iterdir())
    return nearest(path.name, difflib.get_close_matches(path.name, names, n=5, cutoff=0.3) or names[:5])

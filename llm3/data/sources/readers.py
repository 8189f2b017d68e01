"""Opening a split: a built-in corpus, files that llm3 reads itself, or any dataset that `datasets.load_dataset` reads.

A reader can be pickled for other processes, and has

    key                  plain values that identify its content
    pieces()             yields (number of the first row, place); the cut depends on the data only
    rows(first, place)   yields (number, row or BadRow) of a piece
    head()               yields (number, row or BadRow) from the first row on, without reading the rest
"""

import atexit
import codecs
import functools
import glob
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import pandas

from llm3.config.data_schema import SourceConfig
from llm3.data.cache.holds import COPIES, hold_for_life
from llm3.data.sources import corpus
from llm3.data.sources.digests import content_digest
from llm3.data.sources.files import (
    FileReader,
    check_file,
    check_kind,
    flat,
    open_files,
    say_sample_by,
    set_options,
    unknown_split,
)
from llm3.data.sources.split_names import FILE_LOADERS, check_folder, source_name
from llm3.data.sources.tables import LATIN1, READ_ERRORS, DatasetStream, DatasetTable
from llm3.errors import UserError

BUILTIN = "builtin:"
Reader = FileReader | DatasetTable | DatasetStream
TABLE_OPTIONS: dict[str, dict[str, Any]] = {
    # invalid UTF-8 costs only its row, and nothing is null but an empty cell
    "csv": {"encoding": LATIN1, "keep_default_na": False, "na_values": [""], "index_col": False},
    "parquet": {"batch_size": 4096},  # else an empty first row group is an error
}


def open_reader(source: SourceConfig, split: str, cache_dir: Path) -> Reader:
    """The reader of a split; split: its name in the dataset. Raises UserError if it cannot be opened."""
    if source.path.startswith(BUILTIN):
        check_kind(source, "built-in")
        table = corpus.load_corpus(source.path.removeprefix(BUILTIN), split, cache_dir)
        file = Path(table.cache_files[0]["filename"])
        hold_for_life(file.parent)
        return DatasetTable(table, [*file.parts[-2:]])
    for path in _local_files(source):
        check_file(path, source, may_be_empty=glob.has_magic(str(path)) or source.sample_by == "document")
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    if source.path in FILE_LOADERS:  # otherwise opening a local file contacts the hub
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    root = _writable(cache_dir) / COPIES
    hold_for_life(root, create=True)
    files_of = _literal_files(source)
    options: dict[str, Any] = {"data_files": files_of, "data_dir": source.data_dir, "cache_dir": str(root)}
    try:
        builder = datasets.load_dataset_builder(source.path, source.name, **options)
        if not source.data_files and (local := _local_splits(builder)):
            folder = Path("" if source.path in FILE_LOADERS else source.path, source.data_dir or "")
            check_folder(local, folder, source_name(source))
        own = open_files(builder, source, split, root, cache_dir)
        return own or _open_table(builder, source, split, options, cache_dir)
    except READ_ERRORS as error:
        raise UserError(_explained(error, source, split)) from error


def _open_table(
    builder: datasets.DatasetBuilder, source: SourceConfig, split: str, options: dict[str, Any], cache_dir: Path
) -> DatasetTable | DatasetStream:
    """A split that the datasets library reads."""
    name, root = builder.info.builder_name, options["cache_dir"]
    own = TABLE_OPTIONS.get(name, {})
    if name == "text" and source.sample_by:
        own = {"sample_by": source.sample_by}
    elif name == "text":
        say_sample_by(source, builder.config.sample_by)
    local, kind = _local_splits(builder), [name, repr(builder.info.features)]
    if local:  # `datasets` knows a file by its modification time only
        kind.append(repr(set_options(builder.config)))
        every = [file for each in local.values() for file in each]
        own = own | {"cache_dir": f"{root}/{content_digest(every, cache_dir)[:16]}"}
        if name == "csv" and builder.info.features is None:
            own["features"] = _text_columns(builder, every[0])
    builder = datasets.load_dataset_builder(source.path, source.name, **options | own)
    key = [os.path.relpath(builder.cache_dir, root), split, source.streaming]
    if local:
        parts = [part.partition("[")[0].strip() for part in split.split("+")]
        used = [file for part in (parts if set(parts) <= set(local) else local) for file in local[part]]
        key = ["files", *kind, content_digest(used, cache_dir), split, source.streaming]
    latin1 = name == "csv"
    if source.streaming:
        return DatasetStream(builder.as_streaming_dataset(split=split), key, source_name(source), latin1)
    builder.download_and_prepare()
    with suppress(OSError):
        os.utime(builder.cache_dir)  # when it was last used
    return DatasetTable(builder.as_dataset(split=split), key, latin1)


def _text_columns(builder: datasets.DatasetBuilder, file: str) -> datasets.Features:
    """The columns of a CSV file, all of them texts, for a README that says how to read it but not their types."""
    options = builder.config.pd_read_csv_kwargs | TABLE_OPTIONS["csv"] | {"nrows": 0}
    options.pop("chunksize", None)
    columns = pandas.read_csv(file, **options).columns
    return datasets.Features({name: datasets.Value("string") for name in columns})


def _local_splits(builder: datasets.DatasetBuilder) -> dict[str, list[str]]:
    """{split: its files} of a dataset of local files; {} if any of them is elsewhere."""
    splits = {str(name): list(files) for name, files in (builder.config.data_files or {}).items()}
    local = all(os.path.isfile(file) for files in splits.values() for file in files)
    return splits if local else {}


@functools.cache
def _writable(cache_dir: Path) -> Path:
    """The cache directory or, if it is read-only, a temporary one: `datasets` writes files even to read what it has."""
    if not cache_dir.is_dir() or os.access(cache_dir, os.W_OK | os.X_OK):
        return cache_dir
    temporary = Path(tempfile.mkdtemp(prefix="llm3-datasets."))
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    return temporary


def _explained(error: Exception, source: SourceConfig, split: str) -> str:
    known = re.search(r"(?:Unknown|Bad) split:? \"?(?P<split>[^\"]+?)\"?\. [^\[]*\[(?P<valid>.*)\]", str(error))
    if known:
        valid = [name.strip("' ") for name in known["valid"].split(",")]
        return unknown_split(source, split, known["split"], valid)
    if "corresponds to no data" in str(error):
        return f"source {source_name(source)}: split {split!r} has no rows"
    cause = error.__cause__ or error
    if isinstance(cause, UnicodeDecodeError):
        for path in _local_files(source):
            _check_utf8(path)
    if isinstance(cause, ModuleNotFoundError) and cause.name in ("gcsfs", "s3fs"):
        return f"source {source_name(source)}: to read it from a bucket, pip install {cause.name}; or copy it here"
    if isinstance(error, ConnectionError | datasets.exceptions.DatasetNotFoundError | FileNotFoundError):
        return (
            f"source {source_name(source)}: not found here or on the Hugging Face hub, or the hub cannot be reached "
            f"(expected a name on the hub, a folder, one of {', '.join(FILE_LOADERS)} with data_files, "
            f"or {BUILTIN}python, {BUILTIN}numerical): {cause}"
        )
    return f"source {source_name(source)}: cannot read split {split!r}: {cause}"


def _local_files(source: SourceConfig) -> Iterator[Path]:
    """The local files of `data_files`, relative to the working directory, with wildcards expanded."""
    for pattern in flat(source.data_files):
        if "://" in pattern or source.path not in FILE_LOADERS:
            continue
        path = Path(source.data_dir or "", pattern)
        if path.exists() or not glob.has_magic(pattern):
            yield path
            continue
        found = sorted(glob.glob(os.path.join(glob.escape(source.data_dir or ""), pattern), recursive=True))
        if not found:
            raise UserError(f"source {source.path}: no file matches {path}")
        yield from (Path(each) for each in found if os.path.isfile(each))


def _literal_files(source: SourceConfig) -> Any:
    """`data_files` for `datasets`, which reads all paths as patterns: those of existing files and folders are escaped.

    Raises UserError for a folder of files that it would read as a pattern.
    """
    local = source.path in FILE_LOADERS
    if not local and not Path(source.path).is_dir():
        return source.data_files
    folder = Path("" if local else source.path, source.data_dir or "").absolute()
    if not source.data_files:
        if glob.has_magic(str(folder)):
            raise UserError(
                f"source {source_name(source)}: the datasets library reads *, ? and [ in the folder {folder} as "
                "wildcards: rename it, or name its files, as in path='json', data_files=[...]"
            )
        return source.data_files

    def escaped(pattern: str) -> str:
        path = folder / pattern
        if "://" in pattern or not glob.has_magic(str(path)):
            return pattern
        return glob.escape(str(path)) if path.exists() else os.path.join(glob.escape(str(folder)), pattern)

    def each_of(files: Any) -> Any:
        if isinstance(files, dict):
            return {split: each_of(each) for split, each in files.items()}
        return escaped(files) if isinstance(files, str) else [escaped(each) for each in files]

    return each_of(source.data_files)


def _check_utf8(path: Path) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0  # offset of the first byte not decoded yet
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            try:
                decoder.decode(chunk)
                undecoded = len(decoder.getstate()[0])
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {offset + error.start}"
                ) from None
            offset = file.tell() - undecoded
    if undecoded:
        raise UserError(f"{path} is not UTF-8: it ends within a character, at offset {offset}")

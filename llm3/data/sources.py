"""Rows of text, and perhaps labels, from an embedded corpus or from whatever `datasets.load_dataset` reads.

Bad input is a UserError that names the file, field, split or row, before any device work.
"""

import codecs
import dataclasses
import difflib
import functools
import glob
import hashlib
import logging
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llm3.config import SourceConfig, one_of
from llm3.data import corpus
from llm3.errors import UserError, nearest

logger = logging.getLogger(__name__)

BUILTIN = "builtin:"
_TEXT_FORMATS = ("csv", "json", "text")  # loaders of local files that must be UTF-8
_COMPRESSED = {".bz2", ".gz", ".lz4", ".xz", ".zip", ".zst"}


def load(source: SourceConfig, split: str, *, cache_dir: Path) -> datasets.Dataset:
    """The rows of one split ("train", "validation" or "test"): a column "text" (str), and "label" (str) if named.

    Without a validation split of its own, a source holds out `validation_share` of its train split, by a hash of the
    text: equal texts never lie on both sides. `max_documents` keeps the rows of the train split with the smallest
    hashes. Raises UserError for files, fields, splits and rows that cannot be used, and for what cannot be reached.
    """
    one_of("split", split, corpus.SPLITS)
    held_out = split != "test" and not source.validation
    wanted = {"train": source.train, "validation": source.validation, "test": source.test}[split]
    rows = _rows(source, source.train if held_out else wanted, Path(cache_dir))
    dataset = _text_and_label(rows, source)
    if held_out:
        dataset = _held_out(dataset, source, split)
    if split == "train" and 0 < source.max_documents < len(dataset):
        smallest = np.argsort(_hashes(dataset), kind="stable")[: source.max_documents]
        dataset = dataset.select(np.sort(smallest))
    if not len(dataset):
        raise UserError(f"source {_named(source)}: its {split} split has no rows")
    return dataset


def resolved(source: SourceConfig, data_dir: str) -> SourceConfig:
    """The source as it is read where local copies lie in `data_dir` ("" for none; relative to the working directory).

    A source with `local` becomes the files data_dir/local/{train,validation,test}.jsonl, those of them that exist, as
    splits of these names; its fields and its other settings stay. Without a validation file it holds out
    `validation_share`. Any other source is returned as it is. Raises UserError where there is no such file at all.
    """
    if not (data_dir and source.local):
        return source
    folder = Path(data_dir, source.local)
    files = {split: folder / f"{split}.jsonl" for split in corpus.SPLITS}
    found = {split: str(file) for split, file in files.items() if file.is_file()}
    if not found:
        raise UserError(
            f"config.data_dir={data_dir!r}: source local={source.local!r}: {files['train']} does not exist: "
            f"{_nearest_existing(files['train'])}"
        )
    validation = "validation" if "validation" in found else ""
    return dataclasses.replace(
        source,
        path="json",
        name=None,
        data_dir=None,
        data_files=found,
        local="",
        train="train",
        validation=validation,
        test="test",
    )


def _nearest_existing(path: Path) -> str:
    """What there is in the place of a path's first component that does not exist."""
    missing = next(each for each in (*reversed(path.parents), path) if not each.exists())
    if not missing.parent.is_dir():
        return f"{missing.parent} is not a folder"
    names = sorted(entry.name for entry in missing.parent.iterdir())
    near = difflib.get_close_matches(missing.name, names, n=5, cutoff=0.3) or names[:5]
    return f"{missing.parent.absolute()} holds no {missing.name!r}; {nearest(missing.name, near)}"


def _rows(source: SourceConfig, split: str, cache_dir: Path) -> datasets.Dataset:
    if source.path.startswith(BUILTIN):
        return corpus.load(source.path.removeprefix(BUILTIN), split, cache_dir)
    for path in _local_files(source):
        _check_file(path, source)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(
            source.path,
            source.name,
            data_files=source.data_files,
            data_dir=source.data_dir,
            split=split,
            cache_dir=str(cache_dir / "datasets"),
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(_explained(error, source, split)) from error


def _explained(error: Exception, source: SourceConfig, split: str) -> str:
    known = re.search(r"Unknown split \"?(?P<split>[^\"]+)\"?\. Should be one of \[(?P<valid>.*)\]", str(error))
    if known:
        valid = [name.strip("' ") for name in known["valid"].split(",")]
        hint = " (or validation='' and validation_share=0.05)" if split == source.validation else ""
        return f"source {_named(source)}: unknown split {known['split']!r}: {nearest(known['split'], valid)}{hint}"
    if "corresponds to no data" in str(error):
        return f"source {_named(source)}: split {split!r} has no rows"
    cause = error.__cause__ or error
    if isinstance(error, ConnectionError | datasets.exceptions.DatasetNotFoundError | FileNotFoundError):
        return (
            f"source {_named(source)}: not found here, and not on the Hugging Face hub or that cannot be reached "
            f"(expected a name on the hub, a folder, one of {', '.join(_TEXT_FORMATS)} or parquet with data_files, "
            f"or {BUILTIN}python, {BUILTIN}numerical): {cause}"
        )
    return f"source {_named(source)}: cannot read split {split!r}: {cause}"


def _named(source: SourceConfig) -> str:
    return " ".join(str(part) for part in (source.path, source.name, source.data_dir, source.data_files) if part)


def _local_files(source: SourceConfig) -> Iterator[Path]:
    """The files that `data_files` names on this machine, relative to the working directory; wildcards are expanded."""
    for pattern in _flat(source.data_files):
        if "://" in pattern or (source.path not in (*_TEXT_FORMATS, "parquet", "arrow")):
            continue
        path = Path(source.data_dir or "", pattern)
        found = sorted(glob.glob(str(path), recursive=True)) if glob.has_magic(pattern) else [str(path)]
        if not found:
            raise UserError(f"source {source.path}: no file matches {path}")
        yield from map(Path, found)


def _flat(data_files: Any) -> Iterable[str]:
    if isinstance(data_files, dict):
        return [file for files in data_files.values() for file in _flat(files)]
    return [data_files] if isinstance(data_files, str) else list(data_files or ())


def _check_file(path: Path, source: SourceConfig) -> None:
    if not path.is_file():
        if not path.parent.is_dir():
            raise UserError(
                f"source {source.path}: {path} does not exist, nor does its folder {path.parent.absolute()}"
            )
        names = sorted(entry.name for entry in path.parent.iterdir())
        near = difflib.get_close_matches(path.name, names, n=5, cutoff=0.3) or names[:5]
        raise UserError(f"source {source.path}: {path} does not exist: {nearest(path.name, near)}")
    if not path.stat().st_size:
        raise UserError(f"source {source.path}: {path} is empty")
    if source.path in _TEXT_FORMATS and path.suffix not in _COMPRESSED:
        _check_utf8(path)


def _check_utf8(path: Path) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0  # of the first byte that is not decoded yet
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


def _text_and_label(rows: datasets.Dataset, source: SourceConfig) -> datasets.Dataset:
    fields = {"text": source.text} | ({"label": source.label} if source.label else {})
    for field in fields.values():
        if field not in rows.column_names:
            raise UserError(f"source {_named(source)}: unknown field {field!r}: {nearest(field, rows.column_names)}")
    if source.skip_null:
        rows = _without_nulls(rows, list(fields.values()), source)
    columns = {}
    for column, field in fields.items():
        feature = rows.features[field]
        values = _column(rows, field)
        if values.null_count:
            row = pc.index(pc.is_null(values), True).as_py()
            raise UserError(
                f"source {_named(source)}: field {field!r} is missing or null in row {row} (counted from 0)"
            )
        if column == "label" and isinstance(feature, datasets.ClassLabel):
            values = pa.array(feature.int2str(values.to_numpy()), pa.string())
        elif column == "label" and (pa.types.is_integer(values.type) or pa.types.is_boolean(values.type)):
            values = pc.cast(values, pa.string())
        elif not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
            raise UserError(f"source {_named(source)}: field {field!r} holds {values.type}, expected strings")
        columns[column] = values
    return datasets.Dataset(pa.table(columns))


def _without_nulls(rows: datasets.Dataset, fields: list[str], source: SourceConfig) -> datasets.Dataset:
    """The rows in which none of these fields is null; says how many are left out."""
    whole = functools.reduce(pc.and_, (pc.is_valid(_column(rows, field)) for field in fields))
    kept = np.flatnonzero(whole.to_numpy())
    if len(kept) < len(rows):
        left_out = f"{len(rows) - len(kept):,} of {len(rows):,} rows have no {' or no '.join(fields)}"
        logger.warning("source %s: %s: left out", _named(source), left_out)
    return rows.select(kept)


def _column(rows: datasets.Dataset, field: str) -> pa.ChunkedArray:
    return rows.with_format("arrow")[:][field]


def _held_out(dataset: datasets.Dataset, source: SourceConfig, split: str) -> datasets.Dataset:
    if not source.validation_share:
        if split == "train":
            return dataset
        raise UserError(
            f"source {_named(source)}: validation_share=0: without a validation split, "
            "expected a share between 0 and 1 of the train split"
        )
    is_validation = _hashes(dataset) < source.validation_share * 2.0**64
    return dataset.select(np.flatnonzero(is_validation == (split == "validation")))


def _hashes(dataset: datasets.Dataset) -> np.ndarray:
    """The first 64 bits of the sha256 of each text: uint64 [rows]."""
    digests = (hashlib.sha256(text.encode()).digest()[:8] for batch in dataset.iter(1024) for text in batch["text"])
    return np.fromiter((int.from_bytes(digest, "big") for digest in digests), np.uint64, len(dataset))

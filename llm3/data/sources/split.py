"""Opening one split of a source.

Bad input is a UserError that names the file, field, split or row, before any device work. An unusable row is a BadRow
and costs only that row.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

from llm3.config.data_schema import SourceConfig
from llm3.data import formats
from llm3.data.formats import BadRow
from llm3.data.sources import corpus, hooks, selection
from llm3.data.sources.drop import read_drop
from llm3.data.sources.files import nearest_beside
from llm3.data.sources.readers import Reader, open_reader
from llm3.data.sources.records import Records
from llm3.data.sources.split_names import expanded, source_name, with_named_splits
from llm3.errors import UserError, nearest, one_of
from llm3.files import local_path

PROBED_ROWS = 1000  # rows that are searched for the fields
NOT_IN_KEY = {  # fields that do not change records, or that enter the key in another way
    *("path", "name", "data_files", "data_dir", "local", "train", "validation", "test", "streaming"),
    *("validation_share", "max_documents", "drop", "bad_rows", "transforms", "filters"),
}


def open_split(source: SourceConfig, split: str, *, cache_dir: Path) -> Records:
    """The records of one split ("train", "validation" or "test").

    Without a validation split, `validation_share` of the train split is held out by a hash of the text, so that equal
    texts are on the same side. `drop` leaves texts out of the train split; of the others, `max_documents` keeps those
    with the smallest hashes. Rows are read later. Raises UserError for files, fields, splits and functions that do not
    exist or cannot be read.
    """
    one_of("split", split, corpus.SPLITS)
    given = expanded(source)
    name = source_name(given)
    source = with_named_splits(given, name)
    from_train = split != "test" and not source.validation
    wanted = {"train": source.train, "validation": source.validation, "test": source.test}[split]
    held_out = _held_out(source, split, f"source {name}") if from_train else None
    functions = [
        (field, spec, hooks.file_digest(spec, field))
        for field in ("transforms", "filters")
        for spec in getattr(source, field)
    ]
    reader = open_reader(source, source.train if from_train else wanted, Path(cache_dir))
    _check_fields(reader, source, split)
    sample = source.max_documents if split == "train" else 0
    settings = {field: value for field, value in dataclasses.asdict(source).items() if field not in NOT_IN_KEY}
    side = dataclasses.asdict(held_out) if held_out else None
    train = None
    if source.row_format == "choice" and source.answer_base is None and not from_train:
        with contextlib.suppress(UserError):  # many evaluation sets have no train split
            train = open_reader(source, source.train, Path(cache_dir))
    settings |= {"train": train.key} if train else {}
    dropped = read_drop(source.drop) if source.drop and split == "train" else frozenset()
    left_out = [sorted(dropped)] if dropped else []
    unlabelled = {field: value for field, value in settings.items() if field not in ("label", "tag")}
    return Records(
        source,
        _split_name(given, source.train if from_train else wanted),
        split,
        _digest([reader.key, settings, functions, side, sample, *left_out]),
        _digest([reader.key, unlabelled, functions]),
        reader,
        held_out,
        sample,
        train,
        dropped,
    )


def _held_out(source: SourceConfig, split: str, where: str) -> selection.HeldOut | None:
    """How the train split is divided into train and validation; None: it is not. Raises UserError."""
    if source.validation_share:
        return selection.HeldOut(source.validation_share, split == "validation", by_class=bool(source.label))
    if split == "validation":
        raise UserError(
            f"{where}: validation_share=0: without a validation split, expected a share between 0 and 1 of the train "
            "split"
        )
    return None


def _digest(key: Any) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def _split_name(source: SourceConfig, split: str) -> str:
    """The name of a split in messages: the source with the files of this split only."""
    files = source.data_files
    if isinstance(files, dict):
        files = files.get(split.partition("[")[0], files)
    return source_name(dataclasses.replace(source, data_files=files))


def use_local_copy(source: SourceConfig, data_dir: str) -> SourceConfig:
    """The source, or its local copy in `data_dir` (relative to the working directory; "": there are no copies).

    The copy of a source with `local` is data_dir/local/{train,validation,test}.jsonl, as splits of these names; files
    may be missing, and without a validation file `validation_share` is held out. All other settings stay. A source
    without `local` is returned unchanged. Raises UserError if there is none of these files.
    """
    if not (data_dir and source.local):
        return source
    folder = local_path(data_dir, "config.data_dir") / source.local
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
    """Names similar to the first component of a path that does not exist, in its folder."""
    missing = next(each for each in (*reversed(path.parents), path) if not each.exists())
    if not missing.parent.is_dir():
        return f"{missing.parent} is not a folder"
    return f"{missing.parent.absolute()} holds no {missing.name!r}; {nearest_beside(missing)}"


def _check_fields(reader: Reader, source: SourceConfig, split: str) -> None:
    """Raise a UserError if there are no rows, or if a field of the config is in none of the first rows."""
    specs = [source.pair, source.label, source.tag, source.prompt, source.answer, source.messages, source.answers]
    specs += [source.text] if source.row_format in ("text", "span") else []
    choices = [source.choices] if isinstance(source.choices, str) else source.choices
    specs += [each for each in choices if isinstance(source.choices, str) or "{" in each]
    wanted = [name for spec in specs if spec for name in _columns(spec)]
    seen: dict[str, None] = {}
    number = None
    for number, row in itertools.islice(reader.head(), PROBED_ROWS):
        if not isinstance(row, BadRow):
            with contextlib.suppress(BadRow):
                row = hooks.apply_transforms(row, source.transforms, f"source {source_name(source)}: row {number}")
                seen |= dict.fromkeys(row)
            if seen.keys() >= set(wanted):
                return
    if number is None:
        raise UserError(f"source {source_name(source)}: its {split} split has no rows")
    for name in wanted:
        if seen and name not in seen:
            raise UserError(f"source {source_name(source)}: unknown field {name!r}: {nearest(name, seen)}")


def _columns(spec: str) -> list[str]:
    try:
        return formats.columns_of(spec)
    except ValueError as error:
        raise UserError(
            f"config: sources.*: field {spec!r}: {error}; expected a column, or a template over columns "
            "like '{question}\\n{context}'"
        ) from None

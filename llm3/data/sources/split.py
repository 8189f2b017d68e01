"""Records of a source's split: rows read, changed, filtered and selected, each as its form says, in fixed parts.

Bad input is a UserError that names the file, field, split or row, before any device work; a row that cannot be used is
a BadRow, which costs that row only.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from llm3.config.data_schema import SourceConfig
from llm3.data import formats
from llm3.data.formats import BadRow
from llm3.data.sources import corpus, hooks, selection
from llm3.data.sources.lines import Lines
from llm3.data.sources.readers import nearest_beside, open_reader, source_name
from llm3.data.sources.tables import DatasetStream, DatasetTable
from llm3.errors import UserError, nearest, one_of
from llm3.registry import load_plugin

PROBED_ROWS = 1000  # rows in which the fields are looked for
NOT_IN_KEY = {  # fields that records do not follow from, or that are in their key in another form
    *("path", "name", "data_files", "data_dir", "local", "train", "validation", "test", "streaming"),
    *("validation_share", "max_documents", "bad_rows", "transforms", "filters"),
}


def open_split(source: SourceConfig, split: str, *, cache_dir: Path) -> "Records":
    """The records of one split ("train", "validation" or "test").

    Without a validation split of its own, a source holds out `validation_share` of its train split, by a hash of the
    text: equal texts never lie on both sides. `max_documents` keeps the records of the train split with the smallest
    hashes. Raises UserError for files, fields, splits and functions that cannot be used, and for what cannot be
    reached; the rows are read later.
    """
    one_of("split", split, corpus.SPLITS)
    where = f"source {source_name(source)}"
    from_train = split != "test" and not source.validation
    wanted = {"train": source.train, "validation": source.validation, "test": source.test}[split]
    held_out = None
    if from_train and source.validation_share:
        held_out = selection.HeldOut(source.validation_share, split == "validation")
    elif from_train and split == "validation":
        raise UserError(
            f"{where}: validation_share=0: without a validation split, expected a share between 0 and 1 of the train "
            "split"
        )
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
    key = json.dumps([reader.key, settings, functions, side, sample], sort_keys=True)
    return Records(
        source,
        _split_name(source, source.train if from_train else wanted),
        hashlib.sha256(key.encode()).hexdigest(),
        reader,
        held_out,
        sample,
    )


def _split_name(source: SourceConfig, split: str) -> str:
    """How messages call a split: a source, with the files of this split only."""
    files = source.data_files
    if isinstance(files, dict):
        files = files.get(split.partition("[")[0], files)
    return source_name(dataclasses.replace(source, data_files=files))


def use_local_copy(source: SourceConfig, data_dir: str) -> SourceConfig:
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
    return f"{missing.parent.absolute()} holds no {missing.name!r}; {nearest_beside(missing)}"


class Part(NamedTuple):
    """A piece of a split: the number of its first row, and where its reader finds it.

    last: the greatest (hash, row number) that is in the sample of `max_documents`; None where all rows are.
    """

    first: int
    place: tuple
    last: tuple[int, int] | None


@dataclasses.dataclass(frozen=True)
class Records:
    """One split of a source. It goes to other processes by pickle."""

    source: SourceConfig
    name: str  # for messages
    key: str  # of the files, the split and all settings that the records follow from
    reader: Lines | DatasetTable | DatasetStream
    held_out: selection.HeldOut | None
    sample: int  # records at most; 0: all

    def parts(self) -> list[Part]:
        """The pieces of about 32 MiB that the rows are read in, cut by data only."""
        return self._parts

    @functools.cached_property
    def _parts(self) -> list[Part]:
        pieces = [Part(first, place, None) for first, place in self.reader.pieces()]
        if not self.sample:
            return pieces
        rows = (row for part in pieces for row in self._candidates(part))
        usable = ((digest, number) for number, digest, record in rows if not isinstance(record, BadRow))
        last = selection.sample_threshold(usable, self.sample)
        return [part._replace(last=last) for part in pieces]

    def read_part(self, part: Part) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
        """The records of a part, each with its row's number in the source, from 0.

        Rows that are filtered out, held out or not in the sample do not come; nor do as large a share of the bad ones.
        Raises UserError where a transform or a filter fails.
        """
        for number, digest, record in self._candidates(part):
            if part.last is None or (digest, number) <= part.last:
                yield number, record

    def texts(self) -> Iterator[str]:
        """The texts of all records: what a tokenizer is trained on."""
        row_format = load_plugin(formats, self.source.row_format)
        for part in self.parts():
            for _, record in self.read_part(part):
                if not isinstance(record, BadRow):
                    yield from row_format.texts(record)

    def _candidates(self, part: Part) -> Iterator[tuple[int, int, dict[str, Any] | BadRow]]:
        """(number, hash, record) of the rows on this side of the split."""
        hashed = self.held_out is not None or self.sample
        row_format = load_plugin(formats, self.source.row_format)
        for number, row in self.reader.rows(part.first, part.place):
            record = self._record(number, row, row_format)
            if record is None:
                continue
            digest = 0
            if hashed:
                content = f"{number} {record}" if isinstance(record, BadRow) else "\n".join(row_format.texts(record))
                digest = selection.hash_of(content)
                if self.held_out is not None and not self.held_out.takes(digest):
                    continue
            yield number, digest, record

    def _record(
        self, number: int, row: dict[str, Any] | BadRow, row_format: ModuleType
    ) -> dict[str, Any] | BadRow | None:
        """None for a row that a filter does not keep."""
        if isinstance(row, BadRow):
            return row
        where = f"source {self.name}: row {number}"
        try:
            row = hooks.apply_transforms(row, self.source.transforms, where)
            if not hooks.passes_filters(row, self.source.filters, where):
                return None
            record = row_format.read_row(row, self.source)
            if _exceeds(row_format.texts(record), self.source.max_row_bytes):
                raise BadRow(f"longer than {self.source.max_row_bytes:,} bytes")
        except BadRow as reason:
            return BadRow(str(reason), json.dumps(row, ensure_ascii=False, default=str))
        return record


def _exceeds(texts: list[str], most: int) -> bool:
    """Whether the texts have more than so many UTF-8 bytes together."""
    return 4 * sum(map(len, texts)) > most and sum(len(text.encode()) for text in texts) > most


def _check_fields(reader: Lines | DatasetTable | DatasetStream, source: SourceConfig, split: str) -> None:
    """Raise a UserError where there is no row, or none of the first ones has a field that the config names."""
    specs = [source.pair, source.label, source.tag, source.prompt, source.answer, source.messages, source.answers]
    specs += [source.text] if source.row_format in ("text", "span") else []
    specs += [source.choices] if isinstance(source.choices, str) else []
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

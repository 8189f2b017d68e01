"""The records of one split of a source: rows are read in fixed parts, transformed, filtered and selected."""

import dataclasses
import functools
import itertools
import json
from collections.abc import Container, Iterator
from types import ModuleType
from typing import Any, NamedTuple

from llm3.config.data_schema import SourceConfig
from llm3.data import formats
from llm3.data.formats import BadRow
from llm3.data.sources import hooks, selection
from llm3.data.sources.plain_text import WholeFiles
from llm3.data.sources.readers import Reader
from llm3.errors import counted
from llm3.registry import load_plugin


class Part(NamedTuple):
    """A piece of a split: the number of its first row, and its place for the reader.

    last: the greatest (hash, row number) in the sample of `max_documents`; None if the sample holds all rows.
    """

    first: int
    place: tuple
    last: tuple[int, int] | None


@dataclasses.dataclass(frozen=True)
class Records:
    """One split of a source. It can be pickled for other processes."""

    source: SourceConfig
    name: str  # for messages
    split: str  # "train", "validation" or "test"
    key: str  # digest of the files, the split and all settings that change records
    texts_key: str  # the same without labels and without the choice of rows: what decides the texts of a row
    reader: Reader
    held_out: selection.HeldOut | None
    sample: int  # the most records; 0: all
    train: Reader | None = None  # the train split, to look for what this split does not tell
    dropped: frozenset[int] = frozenset()  # hashes of texts that are left out

    def parts(self) -> list[Part]:
        """The pieces of about 32 MiB in which the rows are read; the cut depends on the data only."""
        assert self._resolved and self._moved is not None  # found here, and not by each process that reads parts
        return self._parts

    @functools.cached_property
    def _parts(self) -> list[Part]:
        if not self.sample:
            return self._pieces
        rows = (row for part in self._pieces for row in self._candidates(part))
        usable = ((digest, number) for number, digest, record in rows if not isinstance(record, BadRow))
        last = selection.sample_threshold(usable, self.sample)
        return [part._replace(last=last) for part in self._pieces]

    @functools.cached_property
    def _pieces(self) -> list[Part]:
        return [Part(first, place, None) for first, place in self.reader.pieces()]

    @functools.cached_property
    def _resolved(self) -> SourceConfig:
        """The source, with what only all rows together tell. Cached, so it travels to other processes."""
        if not hasattr(self._row_format, "resolve"):
            return self.source
        rows = (row for part in self._pieces for _, row in self._rows(self.reader.rows(part.first, part.place)))
        train = (row for _, row in self._rows(self.train.head())) if self.train else ()
        good = (row for row in itertools.chain(rows, train) if not isinstance(row, BadRow))
        return self._row_format.resolve(good, self.source, f"source {self.name}")

    @functools.cached_property
    def _moved(self) -> frozenset[int]:
        """Hashes of the texts that change sides; see `HeldOut.moved`. Cached, so it travels to other processes."""
        if self.held_out is None or not self.held_out.by_class:
            return frozenset()
        rows = (row for part in self._pieces for row in self._hashed(part))
        return self.held_out.moved((digest, row["labels"]) for _, digest, row in rows if not isinstance(row, BadRow))

    @property
    def _row_format(self) -> ModuleType:
        return load_plugin(formats, self.source.row_format)

    def read_part(self, part: Part) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
        """Yield (number of the row in the source, record or BadRow) of a part.

        Rows that are filtered out, held out or not in the sample are skipped; unusable rows are held out and sampled
        like others. Raises UserError if a transform or filter fails.
        """
        for number, digest, record in self._candidates(part):
            if part.last is None or (digest, number) <= part.last:
                yield number, record

    def texts(self) -> Iterator[str]:
        """The texts of all records, to train a tokenizer on."""
        row_format = self._row_format
        for part in self.parts():
            for _, record in self.read_part(part):
                if not isinstance(record, BadRow):
                    yield from row_format.texts(record)

    def why_empty(self) -> str:
        """Why there are no records, and which field to change. Reads the split once more."""
        rows = sum(1 for part in self._pieces for _ in self.reader.rows(part.first, part.place))
        kept = sum(1 for part in self._pieces for _ in self._rows(self.reader.rows(part.first, part.place)))
        if rows and not kept:
            return f"filters={self.source.filters} remove all of its {counted(rows, 'row')}"
        if kept and self.held_out is not None:
            if len({digest for part in self._pieces for _, digest, _ in self._hashed(part)}) == 1:
                hint = ", or set sample_by='paragraph'" if isinstance(self.reader, WholeFiles) else ""
                return f"validation_share cannot divide {counted(kept, 'row')} with one text: add rows{hint}"
            if self.held_out.by_class:  # else each side has a text of a class that has two
                return "each of its classes has one text only, which is for training: add rows, or a validation split"
            share = f"validation_share={self.source.validation_share:g} of its {counted(kept, 'row')}"
            better = "smaller" if self.split == "train" else "larger"
            return f"{share} leaves none for {self.split}: set a {better} share"
        return "it has no rows"

    def _candidates(self, part: Part) -> Iterator[tuple[int, int, dict[str, Any] | BadRow]]:
        """Yield (number, hash, record) of the rows on this side of the split."""
        for number, digest, record in self._hashed(part):
            if self.held_out is not None and not self.held_out.takes(digest, self._moved):
                continue
            if digest not in self.dropped or isinstance(record, BadRow):
                yield number, digest, record

    def text_hashes(self, rows: Container[int]) -> dict[int, int]:
        """{row: hash of its texts} of some rows; `dropped` leaves out all rows with the same texts."""
        found = (row for part in self.parts() for row in self.read_part(part) if row[0] in rows)
        return {number: self._hash(number, record) for number, record in found if not isinstance(record, BadRow)}

    def _hash(self, number: int, record: dict[str, Any] | BadRow) -> int:
        """A hash of the texts of a record, or of what is known of an unusable row."""
        if isinstance(record, BadRow):
            return selection.hash_of(f"{number} {record}")
        return selection.hash_of("\n".join(self._row_format.texts(record)))

    def _hashed(self, part: Part) -> Iterator[tuple[int, int, dict[str, Any] | BadRow]]:
        """Yield (number, hash, record) of the rows on both sides; the hash is 0 if nothing needs it."""
        row_format, source = self._row_format, self._resolved
        for number, row in self._rows(self.reader.rows(part.first, part.place)):
            record, digest = _record(row, row_format, source), 0
            if self.held_out is not None or self.sample or self.dropped:
                digest = self._hash(number, record)
            yield number, digest, record

    def _rows(self, rows: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
        """The rows that filters keep, transformed."""
        for number, row in rows:
            where = f"source {self.name}: row {number}"
            if not isinstance(row, BadRow):
                try:
                    row = hooks.apply_transforms(row, self.source.transforms, where)
                    if not hooks.passes_filters(row, self.source.filters, where):
                        continue
                except BadRow as reason:
                    row = _bad(reason, row)
            yield number, row


def _record(row: dict[str, Any] | BadRow, row_format: ModuleType, source: SourceConfig) -> dict[str, Any] | BadRow:
    """The record of a row, or why it cannot be used."""
    if isinstance(row, BadRow):
        return row
    try:
        record = row_format.read_row(row, source)
        if _exceeds(row_format.texts(record), source.max_row_bytes):
            raise BadRow(f"longer than {source.max_row_bytes:,} bytes")
    except BadRow as reason:
        return _bad(reason, row)
    return record


def _bad(reason: BadRow, row: dict[str, Any]) -> BadRow:
    return BadRow(str(reason), json.dumps(row, ensure_ascii=False, default=str))


def _exceeds(texts: list[str], most: int) -> bool:
    """Whether the texts together have more than `most` UTF-8 bytes."""
    return 4 * sum(map(len, texts)) > most and sum(len(text.encode()) for text in texts) > most

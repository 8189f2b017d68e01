"""Rows of the `datasets` library: of a memory-mapped table, or of a stream."""

import copy
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import datasets

from llm3.data.formats import BadRow
from llm3.data.sources.lines import part_bytes
from llm3.errors import UserError

READ_ERRORS = (OSError, ValueError, RuntimeError, ImportError, datasets.exceptions.DatasetsError)
ROWS_AT_A_TIME = 512
STREAM_PART_ROWS = 10_000
LATIN1 = "latin-1"  # one character for each byte


@dataclasses.dataclass(frozen=True)
class DatasetTable:
    """A dataset on disk. It pickles the names of its files, and another process maps them again."""

    dataset: datasets.Dataset
    key: Any  # identifies its content
    latin1: bool = False  # whether each character stands for a byte of UTF-8

    def pieces(self) -> Iterator[tuple[int, tuple[int, int]]]:
        """Yield (number of the first row, (first row, stop row))."""
        count = len(self.dataset)
        total = max(self.dataset.data.nbytes, 1)
        rows = max(1, part_bytes(total) * count // total)
        for start in range(0, count, rows):
            yield start, (start, min(start + rows, count))

    def rows(self, first: int, place: tuple[int, int]) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
        """Yield (number, row) of a piece. Numbers of classes become names."""
        number, stop = place
        names = _class_names(self.dataset.features)
        while number < stop:
            columns = self.dataset[number : min(number + ROWS_AT_A_TIME, stop)]
            for values in zip(*columns.values(), strict=True):
                row = _named(dict(zip(columns, values, strict=True)), names)
                yield number, _decoded(row) if self.latin1 else row
                number += 1

    def head(self) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
        """Yield (number, row) from the first row on."""
        return self.rows(0, (0, len(self.dataset)))


@dataclasses.dataclass(frozen=True)
class DatasetStream:
    """A streamed dataset. Finding its pieces reads it once; each piece holds the state of the stream to resume from."""

    dataset: datasets.IterableDataset
    key: Any
    name: str  # for messages
    latin1: bool = False

    def pieces(self) -> Iterator[tuple[int, tuple[dict[str, Any], int]]]:
        """Yield (number of the first row, (state of the stream before it, number of rows))."""
        stream = copy.deepcopy(self.dataset)
        start, rows = stream.state_dict(), 0
        for total, _ in enumerate(self._read(stream), 1):
            rows += 1
            if rows == STREAM_PART_ROWS:
                yield total - rows, (start, rows)
                start, rows = stream.state_dict(), 0
        if rows:
            yield total - rows, (start, rows)

    def rows(self, first: int, place: tuple[dict[str, Any], int]) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
        """Yield (number, row) of a piece. Numbers of classes become names."""
        state, count = place
        stream = copy.deepcopy(self.dataset)
        stream.load_state_dict(state)
        return enumerate(itertools.islice(self._read(stream), count), first)

    def head(self) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
        """Yield (number, row) from the first row on."""
        return enumerate(self._read(copy.deepcopy(self.dataset)))

    def _read(self, stream: datasets.IterableDataset) -> Iterator[dict[str, Any] | BadRow]:
        names = _class_names(self.dataset.features or {})
        try:
            for row in stream:
                yield _decoded(row) if self.latin1 else _named(row, names)
        except READ_ERRORS as error:
            raise UserError(f"source {self.name}: the stream broke off: {error.__cause__ or error}") from error


def _decoded(row: dict[str, Any]) -> dict[str, Any] | BadRow:
    """A row with one character per byte, decoded as UTF-8."""
    try:
        return {_utf8(name).removeprefix("\ufeff"): _utf8(value) for name, value in row.items()}
    except UnicodeDecodeError:
        return BadRow("not UTF-8", json.dumps(row, ensure_ascii=False, default=str))


def _utf8(value: Any) -> Any:
    return value.encode(LATIN1).decode() if isinstance(value, str) else value


def _class_names(features: dict[str, Any]) -> dict[str, Callable[[Any], Any]]:
    """{column of classes or lists of classes: function from numbers to names}."""
    readers = {column: _class_name(feature) for column, feature in features.items()}
    return {column: reader for column, reader in readers.items() if reader}


def _class_name(feature: Any) -> Callable[[Any], Any] | None:
    if isinstance(feature, datasets.ClassLabel):
        names = dict(enumerate(feature.names))
        return names.get  # a row without a class has null or -1
    if isinstance(feature, datasets.List | datasets.LargeList) and (inner := _class_name(feature.feature)):
        return lambda values: None if values is None else [inner(value) for value in values]
    return None


def _named(row: dict[str, Any], names: dict[str, Callable[[Any], Any]]) -> dict[str, Any]:
    return row | {column: name(row[column]) for column, name in names.items()} if names else row

"""Delimited files (CSV, TSV): every cell is a text, only an empty cell is null, and a damaged row costs only itself.

Quoting follows RFC 4180, section 2: a cell in quotes may hold delimiters, line ends and doubled quotes. A quote inside
a cell without quotes is a character like any other. The number of a row is that of its record after the header, counted
from 0 over all files in order; blank lines are no records.
"""

import collections
import dataclasses
import itertools
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import fsspec

from llm3.data.formats import BadRow
from llm3.data.sources.lines import (
    BOM,
    PART_BYTES,
    UTF16,
    Lines,
    bad_line,
    cut_at,
    is_compressed,
    open_decompressed,
    part_bytes,
    sized_lines,
)
from llm3.errors import UserError

DELIMITERS = (",", ";", "\t", "|")
PROBED_RECORDS = 200  # records that decide between two delimiters
REGULAR = 0.9  # share of records with as many cells as the header, from which on a delimiter is plausible
UNCLOSED = "a quote is not closed, or text follows it"

Record = tuple[int, bytes, list[bytes] | BadRow]  # bytes in the file, beginning, cells (none for a blank line)


class Header(NamedTuple):
    """The columns of a file, its delimiter, and where its rows begin, in bytes."""

    columns: list[str]
    delimiter: bytes
    end: int


class _Unclosed(Exception):
    """A quoted cell has no end."""


@dataclasses.dataclass(frozen=True)
class Delimited(Lines):
    """The rows of delimited files. delimiter: None: found in each file. quote: "": cells are never quoted."""

    delimiter: str | None = None
    quote: str = '"'

    @property
    def key(self) -> list:
        """Identifies the content of the files."""
        return ["delimited", self.delimiter, self.quote, *super().key]

    def pieces(self) -> Iterator[tuple[int, tuple[str, int, int]]]:
        """Yield (number of the first row, (file, start byte, stop byte)); a compressed file is one piece."""
        first, size = 0, self._part_bytes()
        for name in self.files:
            with open_decompressed(name) as file:
                header = self.header(file, name)
                file.seek(header.end)
                ends = self._ends(file, header, first)
                first = yield from cut_at(ends, name, header.end, sys.maxsize if is_compressed(name) else size, first)

    def _part_bytes(self) -> int:
        systems = [fsspec.core.url_to_fs(name) for name in self.files]
        sizes = [system.size(path) for system, path in systems]
        return part_bytes(sum(sizes)) if all(sizes) else PART_BYTES  # not every server tells the size of a file

    def _ends(self, file: BinaryIO, header: Header, first: int) -> Iterator[tuple[int, int]]:
        stop = header.end
        for size, _, cells in self._records(file, sys.maxsize, header.delimiter):
            stop, first = stop + size, first + (cells != [])
            yield stop, first

    def rows(self, first: int, place: tuple[str, int, int]) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
        """Yield (number, row) of a piece, in constant memory."""
        name, start, stop = place
        with open_decompressed(name) as file:
            header = self.header(file, name)
            start = max(start, header.end)
            file.seek(start)
            records = (each for each in self._records(file, stop - start, header.delimiter) if each[2] != [])
            for number, (_, line, cells) in enumerate(records, first):
                yield number, _row(cells, header.columns, line)

    def header(self, file: BinaryIO, name: str) -> Header:
        """The header of a file that is open at its start. Raises UserError if it has none that can be used."""
        given = self.delimiter.replace("\\t", "\t") if self.delimiter else self._found_delimiter(file, name)
        end, delimiter = 0, given.encode()
        file.seek(0)
        for size, line, cells in self._records(file, sys.maxsize, delimiter, at_start=True):
            end += size
            if cells:
                return Header(_columns(name, line, cells), delimiter, end)
        return Header([], delimiter, end)

    def _found_delimiter(self, file: BinaryIO, name: str) -> str:
        """The delimiter that cuts the header, and nearly all of the next records into as many cells. Raises UserError.

        "," if the header is one cell.
        """
        regular: dict[str, float] = {}
        for delimiter in DELIMITERS:
            file.seek(0)
            records = self._records(file, sys.maxsize, delimiter.encode(), at_start=True)
            found = [(line, cells) for _, line, cells in itertools.islice(records, PROBED_RECORDS) if cells != []]
            if found and len(columns := self._well_quoted(*found[0])) > 1:
                same = [not isinstance(cells, BadRow) and len(cells) == len(columns) for _, cells in found]
                regular[delimiter] = sum(same) / len(same)
        plausible = [each for each, share in regular.items() if share >= REGULAR] or list(regular)
        if len(plausible) > 1:
            raise UserError(
                f"{name}: its cells may be separated by {' or '.join(map(repr, plausible))}: "
                "set sources.*.delimiter to one of them"
            )
        return plausible[0] if plausible else ","

    def _well_quoted(self, line: bytes, cells: list[bytes] | BadRow) -> list[bytes]:
        """The cells of a header; [] if one of them has a quote inside but none around it, as by a wrong delimiter."""
        quote = self.quote.encode()
        if isinstance(cells, BadRow):
            return []
        inside = [quote + cell.replace(quote, 2 * quote) + quote for cell in cells if quote and quote in cell]
        return cells if all(cell in line for cell in inside) else []

    def _records(self, file: BinaryIO, size: int, delimiter: bytes, *, at_start: bool = False) -> Iterator[Record]:
        """The records in the next `size` bytes. After an unclosed quote, the next line begins a new record."""
        lines = sized_lines(file, size, self.longest)
        again: collections.deque[tuple[bytes, int]] = collections.deque()  # lines behind an unclosed quote
        if at_start and (first := next(lines, None)):
            again.append((first[0].removeprefix(BOM), first[1]))
        quote = self.quote.encode()
        while entry := again.popleft() if again else next(lines, None):
            line, size = entry
            if size <= self.longest and not (quote and quote in line):  # nearly all records
                yield size, line, _cells(line, iter(()), delimiter, b"")
            else:
                yield self._record(entry, lines, again, delimiter, quote)

    def _record(
        self,
        first: tuple[bytes, int],
        lines: Iterator[tuple[bytes, int]],
        again: collections.deque[tuple[bytes, int]],
        delimiter: bytes,
        quote: bytes,
    ) -> Record:
        """The record that begins with a line."""
        taken = [first]

        def more() -> Iterator[bytes]:
            size = first[1]
            while size <= self.longest and (entry := again.popleft() if again else next(lines, None)):
                taken.append(entry)
                size += entry[1]
                yield entry[0]

        line = first[0]
        too_long = f"longer than {self.longest:,} bytes"
        try:
            cells = _cells(line, more(), delimiter, quote)
        except _Unclosed:
            again.extendleft(reversed(taken[1:]))
            start = _without_end(line)
            return first[1], line, bad_line(too_long if len(start) > self.longest else UNCLOSED, start)
        size, last = sum(size for _, size in taken), taken[-1][0]
        if size - len(last) + len(_without_end(last)) > self.longest:
            return size, line, bad_line(too_long, _without_end(line))
        return size, line, cells


def _cells(line: bytes, more: Iterator[bytes], delimiter: bytes, quote: bytes) -> list[bytes]:
    """The cells of the record that begins with `line`; `more` yields the lines after it. Raises _Unclosed."""
    if not quote:
        line = _without_end(line)
        return line.split(delimiter) if line else []
    cells: list[bytes] = []
    place = 0
    while True:
        if line.startswith(quote, place):
            cell, line, place = _quoted(line, place + len(quote), more, quote)
            cells.append(cell)
            if not _without_end(line[place:]):
                return cells
            if not line.startswith(delimiter, place):
                raise _Unclosed
        else:
            end = line.find(delimiter, place)
            if end < 0:
                return [*cells, _without_end(line[place:])]
            cells.append(line[place:end])
            place = end
        place += len(delimiter)


def _quoted(line: bytes, place: int, more: Iterator[bytes], quote: bytes) -> tuple[bytes, bytes, int]:
    """(a quoted cell, the line that it ends in, the place after its end); place: after its first quote."""
    parts: list[bytes] = []
    while True:
        end = line.find(quote, place)
        after = end + len(quote)
        if end < 0:
            parts.append(line[place:])
            if (following := next(more, None)) is None:
                raise _Unclosed
            line, place = following, 0
        elif line.startswith(quote, after):  # a doubled quote
            parts.append(line[place:after])
            place = after + len(quote)
        else:
            return b"".join([*parts, line[place:end]]), line, after


def _without_end(line: bytes) -> bytes:
    return line.removesuffix(b"\n").removesuffix(b"\r")


def _row(cells: list[bytes] | BadRow, columns: list[str], line: bytes) -> dict[str, Any] | BadRow:
    if isinstance(cells, BadRow):
        return cells
    if len(cells) != len(columns):
        return bad_line(f"{'more' if len(cells) > len(columns) else 'fewer'} cells than the header", _without_end(line))
    try:
        texts = [cell.decode() for cell in cells]
    except UnicodeDecodeError:
        return bad_line("not UTF-8", _without_end(line))
    return {name: text or None for name, text in zip(columns, texts, strict=True) if name}


def _columns(file: str, line: bytes, cells: list[bytes] | BadRow) -> list[str]:
    """The names of a header, without white space around them. Raises UserError."""
    if isinstance(cells, BadRow):
        raise UserError(f"{file}: its header cannot be read: {cells}: {cells.start!r}")
    if line.startswith(UTF16):
        raise UserError(f"{file} is UTF-16; expected UTF-8")
    if b"\r" in _without_end(line) and not line.endswith(b"\n"):
        raise UserError(f"{file}: its lines end in \\r; expected \\n or \\r\\n")
    try:
        names = [cell.decode().strip() for cell in cells]
    except UnicodeDecodeError:
        raise UserError(f"{file}: its header is not UTF-8: {line.decode(errors='replace').strip()!r}") from None
    for name in names:
        if name and names.count(name) > 1:
            raise UserError(f"{file}: its header has the column {name!r} twice")
    return names

"""The rows of one file or of standard input, all of them and in their order, as `predict` reads them."""

import dataclasses
import hashlib
import itertools
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from llm3.data.formats import BadRow
from llm3.data.sources.delimited import Delimited
from llm3.data.sources.json_arrays import JsonArrays, is_json_array
from llm3.data.sources.lines import BOM, Lines, check_lines, open_decompressed, sized_lines
from llm3.errors import UserError, closest, nearest
from llm3.files import local_path

STDIN = "-"
KINDS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".txt": "text"}
KINDS |= {".parquet": "parquet"}
COMPRESSED = (".gz", ".bz2", ".xz")
LONGEST = 10_000_000  # bytes of a row, as `SourceConfig.max_row_bytes`
ROWS_AT_A_TIME = 1024  # of a Parquet file

Row = dict[str, Any] | BadRow


@dataclasses.dataclass(frozen=True)
class PlainLines(Lines):
    """A text per line for the field "text"; a blank line is a row too."""

    def read_line(self, line: bytes) -> Row | None:
        return super().read_line(line) or {"text": ""}


@dataclasses.dataclass(frozen=True)
class ParquetRows:
    """The rows of a Parquet file."""

    file: str

    def rows(self, first: int, place: object) -> Iterator[tuple[int, Row]]:
        """Yield (number, row). Raises UserError for a file that is not Parquet."""
        try:
            with pq.ParquetFile(self.file) as file:
                batches = file.iter_batches(batch_size=ROWS_AT_A_TIME)
                yield from enumerate(itertools.chain.from_iterable(each.to_pylist() for each in batches), first)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"--in={self.file}: cannot be read as Parquet: {error}") from error


class Input:
    """One file or standard input. name: for messages. plain: its rows are lines of text, in the column "text".

    digest: the sha256 of the file; "" for standard input, which can be read once.
    """

    def __init__(self, name: str, reader: Any, plain: bool, digest: str = "", stream: Iterator[Row] | None = None):
        self.name, self.plain, self.digest = name, plain, digest
        self._reader, self._stream = reader, stream
        self._seen: list[Row] = []  # what was read ahead of the stream

    @property
    def is_stream(self) -> bool:
        return self._stream is not None

    def head(self, rows: int) -> list[Row]:
        """The first rows, which `rows` yields again."""
        if self._stream is None:
            return list(itertools.islice(self.rows(), rows))
        self._seen += itertools.islice(self._stream, rows - len(self._seen))
        return self._seen[:rows]

    def rows(self) -> Iterator[Row]:
        """Yield all rows in order. Blank lines are rows of plain text only."""
        if self._stream is not None:
            return itertools.chain(self._seen, self._stream)
        return (row for _, row in self._reader.rows(0, (self.name, 0, sys.maxsize)))

    def count(self) -> int | None:
        """The number of rows, which costs reading the file; None for standard input."""
        return None if self.is_stream else sum(1 for _ in self.rows())


def open_input(given: str) -> Input:
    """The file that `--in` names, read by its suffix, or "-". Raises UserError.

    .jsonl and .json (a row per line, or an array), .csv and .tsv, .parquet, .txt (a text per line), all but Parquet
    also compressed as .gz, .bz2 or .xz. Standard input holds JSON rows if its first line is one, else texts.
    """
    if given == STDIN:
        return _open_stream(sys.stdin.buffer)
    path = local_path(given, "--in")
    suffixes = [each.lower() for each in path.suffixes]
    suffix = suffixes[-2] if suffixes[-1:] and suffixes[-1] in COMPRESSED and suffixes[:-1] else "".join(suffixes[-1:])
    if not path.is_file():
        beside = [each.name for each in path.parent.iterdir() if each.is_file()] if path.parent.is_dir() else []
        raise UserError(f"--in={given}: no such file; {closest(path.name, beside)}expected a file or '-'")
    if suffix not in KINDS:
        raise UserError(f"--in={given}: {nearest(suffix, KINDS)}, or '-' for standard input")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    name, kind = str(path), KINDS[suffix]
    if kind == "parquet":
        return Input(name, ParquetRows(name), False, digest)
    if kind != "csv":
        with open_decompressed(name) as content:
            check_lines(content, name)
    settings = ((name,), kind == "json", LONGEST, digest)
    if kind == "csv":
        return Input(name, Delimited(*settings), False, digest)
    if kind == "text":
        return Input(name, PlainLines(*settings), True, digest)
    return Input(name, (JsonArrays if is_json_array(name) else Lines)(*settings), False, digest)


def _open_stream(stream: BinaryIO) -> Input:
    """Standard input. Waits for its first line."""
    lines = (line.removesuffix(b"\n").removesuffix(b"\r") for line, _ in sized_lines(stream, sys.maxsize, LONGEST))
    first = [each.removeprefix(BOM) for each in itertools.islice(lines, 1)]
    objects = Lines((STDIN,), True, LONGEST, "")
    plain = not all(isinstance(objects.read_line(each), dict) for each in first)
    reader = PlainLines((STDIN,), False, LONGEST, "") if plain else objects
    read = (reader.read_line(line) for line in itertools.chain(first, lines))
    return Input("standard input", None, plain, stream=(row for row in read if row is not None))

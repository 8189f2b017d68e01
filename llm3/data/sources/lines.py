"""Local files with a JSON object or a text per line, read by ranges of bytes. A damaged line costs only that line.

The number of a row is the number of its line, counted from 0 over all files in order. Blank lines are no rows.
"""

import bz2
import contextlib
import dataclasses
import gzip
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import fsspec

from llm3.data.formats import START_CHARACTERS, BadRow
from llm3.errors import UserError

PART_BYTES = 32 << 20  # the largest part; a corpus up to this size is one part
PARTS = 64  # parts of a larger corpus, enough to keep many cores busy to the end
SMALLEST_PART_BYTES = 1 << 20
BLOCK = 1 << 20  # bytes read at once
BOM = b"\xef\xbb\xbf"
UTF16 = (b"\xff\xfe", b"\xfe\xff")
# By the first bytes of a file: how it is opened, and archives, which the datasets library reads.
OPENERS: dict[bytes, Callable[[BinaryIO, str], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
}
ARCHIVES = (b"PK\x03\x04", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18", b"Rar!", b"7z\xbc\xaf")


def part_bytes(total: int) -> int:
    """The bytes per part of a corpus of `total` bytes, the same on every machine. A part ends at the next line end."""
    return PART_BYTES if total <= PART_BYTES else min(PART_BYTES, max(SMALLEST_PART_BYTES, total // PARTS))


@dataclasses.dataclass(frozen=True)
class Lines:
    """The rows of files of lines. objects: whether a line is a JSON object, or else a text for the field "text"."""

    files: tuple[str, ...]
    objects: bool
    longest: int  # the most bytes of a line
    content: str  # digest of the contents of the files

    @property
    def key(self) -> list:
        """Identifies the content of the files."""
        return ["lines", self.objects, self.content]

    def pieces(self) -> Iterator[tuple[int, tuple[str, int, int]]]:
        """Yield (number of the first row, (file, start byte, stop byte)); a compressed file is one piece."""
        first, size = 0, part_bytes(sum(Path(name).stat().st_size for name in self.files))
        for name in self.files:
            first = yield from self.pieces_of(name, size, first)

    def pieces_of(self, name: str, size: int, first: int) -> Generator[tuple[int, tuple[str, int, int]], None, int]:
        """Yield the pieces of a file, of about `size` bytes; return the number of the first row of the next file."""
        with open_decompressed(name) as file:
            check_lines(file, name)
            return (yield from _cuts(file, name, sys.maxsize if _opener(name) else size, first))

    def rows(self, first: int, place: tuple[str, int, int]) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
        """Yield (number, row) of a piece, in constant memory."""
        name, start, stop = place
        with open_decompressed(name) as file:
            file.seek(start)
            for number, line in enumerate(_lines(file, stop - start, self.longest), first):
                if number == first and start == 0:
                    line = line.removeprefix(BOM)
                row = self.read_line(line)
                if row is not None:
                    yield number, row

    def head(self) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
        """Yield (number, row) from the first row on; numbers restart in each file."""
        for name in self.files:
            yield from self.rows(0, (name, 0, sys.maxsize))

    def read_line(self, line: bytes) -> dict[str, Any] | BadRow | None:
        """The row of a line without its end; None for a blank line."""
        if len(line) > self.longest:
            return bad_line(f"longer than {self.longest:,} bytes", line)
        try:
            text = line.decode()
        except UnicodeDecodeError:
            return bad_line("not UTF-8", line)
        if not text.strip():
            return None
        if not self.objects:
            return {"text": text.removesuffix("\r")}
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):
            return bad_line("not JSON", line)
        return row if isinstance(row, dict) else bad_line("not a JSON object", line)


def check_lines(file: BinaryIO, name: str) -> None:
    """Raise UserError for a file, open at its start, that is UTF-16 or whose lines end in a carriage return alone."""
    start = file.read(BLOCK)
    if start.startswith(UTF16):
        raise UserError(f"{name} is UTF-16; expected UTF-8")
    if b"\n" not in start and b"\r" in start.rstrip(b"\r"):
        raise UserError(f"{name}: its lines end in \\r; expected \\n or \\r\\n")
    file.seek(0)


def bad_line(reason: str, line: bytes) -> BadRow:
    """An unusable row and its beginning."""
    return BadRow(reason, line[: 4 * START_CHARACTERS].decode(errors="replace"))


def is_archive(file: str) -> bool:
    """Whether a file holds other files, or is compressed in a way that only `datasets` reads."""
    head = head_of(file)
    return head.startswith(ARCHIVES) or head[257:262] == b"ustar"


def head_of(file: str) -> bytes:
    """The first bytes of a file, decompressed."""
    with open_decompressed(file) as content:
        return content.read(1024)


@contextlib.contextmanager
def open_decompressed(name: str) -> Iterator[BinaryIO]:
    """Open a file, decompressed if necessary. Raises UserError for damaged content."""
    opener = _opener(name)
    with _open(name) as content, opener(content, "rb") if opener else content as file:
        try:
            yield file
        except (EOFError, lzma.LZMAError, zlib.error, OSError) as error:
            raise UserError(f"{name} cannot be {'decompressed' if opener else 'read'}: {error}") from error


def is_compressed(name: str) -> bool:
    """Whether a file is read through a decompressor; it can then be read from its start only."""
    return _opener(name) is not None


def _open(name: str) -> BinaryIO:
    """A local file, or one behind an address like "hf://datasets/..."."""
    return fsspec.open(name, "rb").open() if "://" in name else open(name, "rb")


def _opener(name: str) -> Callable[[BinaryIO, str], Any] | None:
    with _open(name) as file:
        start = file.read(6)
    return next((opener for magic, opener in OPENERS.items() if start.startswith(magic)), None)


def sized_lines(file: BinaryIO, size: int, longest: int) -> Iterator[tuple[bytes, int]]:
    """Yield (line with its end, its size in bytes) of the next `size` bytes. A line over `longest` bytes is cut."""
    while size > 0 and (line := file.readline(longest + 3)):  # room for a line end, and for one byte too many
        length, rest = len(line), line
        while not rest.endswith(b"\n") and (rest := file.readline(BLOCK)):
            length += len(rest)
        size -= length
        yield line, length


def cut_at(
    ends: Iterable[tuple[int, int]], name: str, start: int, size: int, first: int
) -> Generator[tuple[int, tuple[str, int, int]], None, int]:
    """Cut a file into pieces of at least `size` bytes, from the byte `start`, where the row `first` begins.

    ends: (byte, number of the row that begins there), each place where the file may be cut, the end of the file last.
    Yields as `Lines.pieces`; returns the number of the first row of the next file.
    """
    stop, number = start, first
    for stop, number in ends:
        if stop - start >= size:
            yield first, (name, start, stop)
            start, first = stop, number
    if stop > start:
        yield first, (name, start, stop)
    return number


def _cuts(file: BinaryIO, name: str, size: int, first: int) -> Generator[tuple[int, tuple[str, int, int]], None, int]:
    """Cut a file at line ends into pieces of about `size` bytes. first: the number of its first line.

    Yields as `Lines.pieces`; returns the number of the first line of the next file.
    """
    start = offset = 0
    lines, last = first, b"\n"
    while block := file.read(BLOCK):
        counted = 0
        while end := block.find(b"\n", max(start + size - 1 - offset, counted)) + 1:
            lines += block.count(b"\n", counted, end)
            yield first, (name, start, offset + end)
            start, first, counted = offset + end, lines, end
        lines += block.count(b"\n", counted)
        offset += len(block)
        last = block[-1:]
    if offset > start:
        yield first, (name, start, offset)
    return lines + (last != b"\n")


def _lines(file: BinaryIO, size: int, longest: int) -> Iterator[bytes]:
    """The lines in the next `size` bytes, without line ends. A line over `longest` bytes is cut, but still too long."""
    rest = b""
    while size > 0 and (block := file.read(min(size, BLOCK))):
        size -= len(block)
        *lines, last = block.split(b"\n")
        if lines:
            yield rest + lines[0]
            yield from lines[1:]
            rest = last
        else:
            rest = (rest + last)[: longest + 1]
    if rest:
        yield rest

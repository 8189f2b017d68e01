"""Plain text whose rows are paragraphs or whole files. Rows that are lines are read by `llm3.data.sources.lines`."""

import dataclasses
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from llm3.data.formats import BadRow
from llm3.data.sources.lines import (
    BOM,
    Lines,
    bad_line,
    check_lines,
    cut_at,
    is_compressed,
    open_decompressed,
    part_bytes,
    sized_lines,
)


@dataclasses.dataclass(frozen=True)
class Paragraphs(Lines):
    """Runs of lines between blank lines. The number of a row is that of its first line."""

    @property
    def key(self) -> list:
        """Identifies the content of the files."""
        return ["paragraphs", *super().key]

    def pieces_of(self, name: str, size: int, first: int) -> Generator[tuple[int, tuple[str, int, int]], None, int]:
        """Yield the pieces of a file, cut at blank lines; return the number of the first line of the next file."""
        with open_decompressed(name) as file:
            check_lines(file, name)
            most = sys.maxsize if is_compressed(name) else size
            return (yield from cut_at(self._ends(file, first), name, 0, most, first))

    def _ends(self, file: BinaryIO, number: int) -> Iterator[tuple[int, int]]:
        stop, blank = 0, True
        for line, size in sized_lines(file, sys.maxsize, self.longest):
            stop, number, blank = stop + size, number + 1, not line.strip()
            if blank:
                yield stop, number
        if not blank:
            yield stop, number

    def rows(self, first: int, place: tuple[str, int, int]) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
        """Yield (number, row) of a piece, in constant memory."""
        name, start, stop = place
        with open_decompressed(name) as file:
            file.seek(start)
            begun, paragraph, size = first, list[bytes](), 0
            for number, (line, length) in enumerate(sized_lines(file, stop - start, self.longest), first):
                line = line if start or number > first else line.removeprefix(BOM)
                if line.strip():
                    begun = begun if paragraph else number
                    if size <= self.longest:
                        paragraph.append(line)
                        size += length
                elif paragraph:
                    yield begun, text_row(b"".join(paragraph).rstrip(b"\r\n"), self.longest)
                    paragraph, size = [], 0
            if paragraph:
                yield begun, text_row(b"".join(paragraph).rstrip(b"\r\n"), self.longest)


@dataclasses.dataclass(frozen=True)
class WholeFiles:
    """Each file is a row, with its line breaks. The number of a row is that of its file."""

    files: tuple[str, ...]
    longest: int  # the most bytes of a file
    content: str  # digest of the contents of the files

    @property
    def key(self) -> list:
        """Identifies the content of the files."""
        return ["files", self.content]

    def pieces(self) -> Iterator[tuple[int, tuple[int, int]]]:
        """Yield (number of the first file, (first file, stop file))."""
        sizes = [Path(name).stat().st_size for name in self.files]
        most = part_bytes(sum(sizes))
        first = together = 0
        for number, size in enumerate(sizes):
            if together + size > most and number > first:
                yield first, (first, number)
                first, together = number, 0
            together += size
        yield first, (first, len(sizes))

    def rows(self, first: int, place: tuple[int, int]) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
        """Yield (number, row) of a piece, with one file in memory."""
        for number in range(*place):
            with open_decompressed(self.files[number]) as file:
                content = file.read(len(BOM) + 2 * self.longest + 1)  # a line end of two bytes becomes one
            yield number, text_row(content.removeprefix(BOM), self.longest)

    def head(self) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
        """Yield (number, row) from the first row on."""
        return self.rows(0, (0, len(self.files)))


def text_row(content: bytes, longest: int) -> dict[str, Any] | BadRow:
    """A row of several lines, each of which ends in one byte."""
    content = content.replace(b"\r\n", b"\n")
    if len(content) > longest:
        return bad_line(f"longer than {longest:,} bytes", content)
    try:
        return {"text": content.decode()}
    except UnicodeDecodeError:
        return bad_line("not UTF-8", content)

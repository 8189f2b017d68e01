"""JSON documents that hold all rows: an array, or an object whose first value "data" is an array.

Values are read as Python reads them, so no column needs one type for all rows. The number of a row is its place,
counted from 0 over all files in order.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm3.data.formats import BadRow
from llm3.data.sources.lines import (
    BOM,
    Lines,
    bad_line,
    cut_at,
    head_of,
    is_compressed,
    open_decompressed,
    part_bytes,
)
from llm3.errors import UserError

_START = re.compile(r'\s*(?:\{\s*"data"\s*:\s*)?\[')
_BETWEEN = re.compile(r"\s*,?\s*")
_DECODER = json.JSONDecoder()
ERRORS = "surrogateescape"  # bytes that are not UTF-8 become half characters, which a text may not hold


@dataclasses.dataclass(frozen=True)
class JsonArrays(Lines):
    """The rows of JSON arrays. Finding the pieces reads each file into memory; reading a piece reads the piece only."""

    @property
    def key(self) -> list:
        """Identifies the content of the files."""
        return ["arrays", *super().key]

    def pieces(self) -> Iterator[tuple[int, tuple[str, int, int]]]:
        """Yield (number of the first row, (file, start byte, stop byte)); a compressed file is one piece.

        Raises UserError for a file that is not JSON.
        """
        first, size = 0, part_bytes(sum(Path(name).stat().st_size for name in self.files))
        for name in self.files:
            text, begin = _content(name, 0, sys.maxsize)
            most = sys.maxsize if is_compressed(name) else size
            first = yield from cut_at(_ends(text, begin, most, first, name), name, 0, most, first)

    def rows(self, first: int, place: tuple[str, int, int]) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
        """Yield (number, row) of a piece. Raises UserError for a file that is not JSON."""
        name, start, stop = place
        text, begin = _content(name, start, stop)
        for number, (row, _) in enumerate(_elements(text, begin, name), first):
            yield number, row if isinstance(row, dict) else bad_line("not a JSON object", json.dumps(row).encode())


def is_json_array(file: str) -> bool:
    """Whether a .json file is an array of rows, or an object {"data": [...]} with one."""
    if ".json" not in Path(file).suffixes:
        return False
    return _START.match(head_of(file).removeprefix(BOM).decode(errors="replace")) is not None


def _content(name: str, start: int, stop: int) -> tuple[str, int]:
    """(the text between two bytes of a file, the place in it where elements begin)."""
    with open_decompressed(name) as file:
        file.seek(start)
        text = file.read(stop - start if stop < sys.maxsize else -1).decode(errors=ERRORS)
    if start:
        return text, 0
    found = _START.match(text, begin := int(text.startswith("\ufeff")))
    return text, found.end() if found else begin


def _elements(text: str, place: int, name: str) -> Iterator[tuple[Any, int]]:
    """Yield (element of an array, its end in the text). Raises UserError for an element that is not JSON."""
    while True:
        between = _BETWEEN.match(text, place)
        place = between.end() if between else place
        if text[place : place + 1] in ("", "]"):
            return
        try:
            element, place = _DECODER.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{name} is not JSON at {text[place : place + 40]!r}: {error}") from None
        yield element, place


def _ends(text: str, begin: int, size: int, number: int, name: str) -> Iterator[tuple[int, int]]:
    """Yield (byte, number of the next row) about every `size` bytes, and at the end of the array."""
    counted, stop = 0, begin
    byte = 0
    for _, stop in _elements(text, begin, name):
        number += 1
        if stop - counted >= size:  # at least as many bytes
            byte += len(text[counted:stop].encode(errors=ERRORS))
            counted = stop
            yield byte, number
    if not text[stop:].lstrip().startswith("]"):
        raise UserError(f"{name} ends before its array does")
    if stop > counted:
        yield byte + len(text[counted:stop].encode(errors=ERRORS)), number

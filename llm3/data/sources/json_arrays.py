"""JSON documents that hold all rows: an array, or an object whose first value "data" is an array.

Files of lines may stand among them.

Values are read as Python reads them, so no column needs one type for all rows. The number of a row is its place,
counted from 0 over all files in order.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Generator, Iterator
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
)
from llm3.errors import UserError

_START = re.compile(r'\s*(?:\{\s*"data"\s*:\s*)?\[')
_BETWEEN = re.compile(r"\s*,?\s*")
_LINES = {".jsonl", ".ndjson"}  # suffixes of files that are never an array
_DECODER = json.JSONDecoder()
ERRORS = "surrogateescape"  # bytes that are not UTF-8 become half characters, which a text may not hold


@dataclasses.dataclass(frozen=True)
class JsonArrays(Lines):
    """The rows of JSON arrays. Finding the pieces reads each file into memory; reading a piece reads the piece only."""

    @property
    def key(self) -> list:
        """Identifies the content of the files."""
        return ["arrays", *super().key]

    def pieces_of(self, name: str, size: int, first: int) -> Generator[tuple[int, tuple[str, int, int]], None, int]:
        """Yield the pieces of a file; return the number of the first row of the next. Raises UserError for bad JSON."""
        if not is_json_array(name):
            return (yield from super().pieces_of(name, size, first))
        text, begin = _content(name, 0, sys.maxsize)
        most = sys.maxsize if is_compressed(name) else size
        return (yield from cut_at(_ends(text, begin, most, first, name), name, 0, most, first))

    def rows(self, first: int, place: tuple[str, int, int]) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
        """Yield (number, row) of a piece. Raises UserError for a file that is not JSON."""
        name, start, stop = place
        if not is_json_array(name):
            yield from super().rows(first, place)
            return
        text, begin = _content(name, start, stop)
        for number, (row, _) in enumerate(_elements(text, begin, name), first):
            yield number, row if isinstance(row, dict) else bad_line("not a JSON object", json.dumps(row).encode())


def is_json_array(file: str) -> bool:
    """Whether a file is an array of rows, or an object {"data": [...]} with one, by its beginning and its suffix."""
    if not _LINES.isdisjoint(Path(file).suffixes):
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
    _check_rest(text, stop, text[:begin].lstrip("\ufeff \t\r\n").startswith("{"), name)
    if stop > counted:
        yield byte + len(text[counted:stop].encode(errors=ERRORS)), number


def _check_rest(text: str, place: int, is_object: bool, name: str) -> None:
    """Raise UserError unless an array, or the object that it is in, ends with the text after its last element."""
    rest = text[place:].lstrip(" \t\r\n,")
    if not rest.startswith("]"):
        raise UserError(f"{name} ends before its array does")
    rest = rest[1:].strip()
    try:
        complete = isinstance(json.loads("{" + rest.removeprefix(",")), dict) if is_object else not rest
    except (ValueError, RecursionError):
        complete = False
    if not complete:
        raise UserError(
            f"{name} goes on after its array, at {rest[:40]!r}: expected one array in a file, or an object per line in "
            "a file that ends in .jsonl"
        )

"""Parts and sums of splits, such as "train[:90%]" or "train+test", of files that llm3 reads itself."""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import datasets

from llm3.data.formats import BadRow


class Range(NamedTuple):
    """Rows [start, stop) of a reader of files. pieces: (rows before it, number of its first row, its place) of each."""

    reader: Any
    start: int
    stop: int
    pieces: tuple[tuple[int, int, Any], ...]


@dataclasses.dataclass(frozen=True)
class Slices:
    """Ranges of rows, end to end and numbered anew, without gaps."""

    ranges: tuple[Range, ...]

    @property
    def key(self) -> list:
        """Identifies the content of the rows."""
        return ["slices", *([each.reader.key, each.start, each.stop] for each in self.ranges)]

    def pieces(self) -> Iterator[tuple[int, tuple[int, int]]]:
        """Yield (number of the first row, (range, piece of its reader))."""
        before = 0
        for index, each in enumerate(self.ranges):
            for piece, (begin, _, _) in enumerate(each.pieces):
                end = each.pieces[piece + 1][0] if piece + 1 < len(each.pieces) else each.stop
                if begin < each.stop and end > each.start:
                    yield before + max(begin - each.start, 0), (index, piece)
            before += each.stop - each.start

    def rows(self, first: int, place: tuple[int, int]) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
        """Yield (number, row) of a piece."""
        index, piece = place
        reader, start, stop, pieces = self.ranges[index]
        begin, number, inner = pieces[piece]
        shift = first - max(begin, start)
        for position, (_, row) in enumerate(reader.rows(number, inner), begin):
            if start <= position < stop:
                yield position + shift, row

    def head(self) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
        """Yield (number, row) from the first row on."""
        for first, place in self.pieces():
            yield from self.rows(first, place)


def sliced(spec: str, readers: Mapping[str, Any]) -> Slices:
    """The rows that a name in `datasets` stands for. readers: the splits. Raises ValueError if there is no such split.

    Counts the rows of the splits, so it reads them.
    """
    spec = "+".join(readers) if spec == "all" else spec
    pieces, lengths = {}, dict.fromkeys(readers, 0)
    for name in readers.keys() & re.findall(r"\w+", spec):
        found = list(readers[name].pieces())
        counts = [sum(1 for _ in readers[name].rows(*piece)) for piece in found]
        before = [0, *itertools.accumulate(counts)]
        pieces[name] = tuple((rows, *piece) for rows, piece in zip(before, found, strict=False))
        lengths[name] = before[-1]
    instructions = datasets.ReadInstruction.from_spec(spec).to_absolute(lengths)
    return Slices(tuple(Range(readers[i.splitname], i.from_, i.to, pieces[i.splitname]) for i in instructions))

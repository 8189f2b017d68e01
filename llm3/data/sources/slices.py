"""Parts and sums of splits, such as "train[:90%]" or "train+test", of files that llm3 reads itself."""

import dataclasses
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import datasets

from llm3.data.formats import BadRow
from llm3.data.sources.lines import Lines


@dataclasses.dataclass(frozen=True)
class Slices:
    """Ranges of rows, end to end and numbered anew.

    ranges: (reader whose rows are numbered without gaps, number of the first row, number after the last one).
    """

    ranges: tuple[tuple[Lines, int, int], ...]

    @property
    def key(self) -> list:
        """Identifies the content of the rows."""
        return ["slices", *([reader.key, start, stop] for reader, start, stop in self.ranges)]

    def pieces(self) -> Iterator[tuple[int, tuple[int, int, tuple]]]:
        """Yield (number of the first row, (range, number of the first row in its reader, place in its reader))."""
        before = 0
        for index, (reader, start, stop) in enumerate(self.ranges):
            pieces = list(reader.pieces())
            ends = [*(first for first, _ in pieces[1:]), sys.maxsize]
            for (first, place), end in zip(pieces, ends, strict=True):
                if first < stop and end > start:
                    yield before + max(first - start, 0), (index, first, place)
            before += stop - start

    def rows(self, first: int, place: tuple[int, int, tuple]) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
        """Yield (number, row) of a piece."""
        index, inside, inner = place
        reader, start, stop = self.ranges[index]
        shift = first - max(inside, start)
        for number, row in reader.rows(inside, inner):
            if start <= number < stop:
                yield number + shift, row

    def head(self) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
        """Yield (number, row) from the first row on."""
        for first, place in self.pieces():
            yield from self.rows(first, place)


def sliced(spec: str, readers: Mapping[str, Lines]) -> Slices:
    """The rows that a name in `datasets` stands for. readers: the splits. Raises ValueError if there is no such split.

    Counts the rows of the splits, so it reads them.
    """
    spec = "+".join(readers) if spec == "all" else spec
    counts = dict.fromkeys(readers, 0)
    for name in readers.keys() & re.findall(r"\w+", spec):
        counts[name] = sum(1 for piece in readers[name].pieces() for _ in readers[name].rows(*piece))
    found = datasets.ReadInstruction.from_spec(spec).to_absolute(counts)
    return Slices(tuple((readers[each.splitname], each.from_, each.to) for each in found))

"""The output of predictions: parts that are written one after another, and joined into one file at the end.

FILE.provenance.json says what the output was made from: it is written first. FILE.parts/ holds JSON lines of finished
rows until FILE itself exists. So the same command resumes after a kill, with the same bytes, and no other command
overwrites or continues the output.
"""

import contextlib
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from llm3.errors import UserError, writing
from llm3.files import local_path, read_json, sync, write_atomic, write_json
from llm3.predict.tables import write_csv, write_parquet

STDOUT = "-"
RESULTS = ("rows", "errors", "truncated")  # in the provenance of a finished output only


class Output:
    """An output file. columns: {column of predictions: type}; all other columns are those of the input."""

    def __init__(self, given: str, provenance: dict[str, Any], columns: Mapping[str, pa.DataType]):
        self.path = local_path(given, "--out")
        self._columns, self._provenance = columns, json.loads(json.dumps(provenance))
        self._parts = self.path.with_name(f"{self.path.name}.parts")
        self._about = self.path.with_name(f"{self.path.name}.provenance.json")

    def begin(self) -> int | None:
        """The number of parts that are finished; None: all is, and nothing is left to do.

        Raises UserError for an output of another command, and for a folder that cannot be written.
        """
        saved = read_json(self._about)
        finished = saved is not None and "rows" in saved
        for each in [self.path] * (not finished) + [self._parts] * (saved is None):
            if each.exists():
                raise UserError(f"--out={self.path}: {each} exists already; nothing was changed: use another --out")
        if lines := self._changes(saved or self._provenance):
            raise UserError(
                f"--out={self.path} belongs to other predictions:\n" + "\n".join(lines) + "\nNothing was changed. "
                f"Use another --out, or move it away together with {self._about.name}."
            )
        if self.path.exists():
            shutil.rmtree(self._parts, ignore_errors=True)
            return None
        with writing(self._parts):
            self._parts.mkdir(parents=True, exist_ok=True)
        write_json(self._about, self._provenance)
        return len(self._finished())

    def _changes(self, saved: dict[str, Any]) -> list[str]:
        """The differences from the provenance that is saved, one per line."""
        now = self._provenance
        names = sorted((saved.keys() | now.keys()) - {*RESULTS})
        return [f"  {n}: saved {saved.get(n)!r}, now {now.get(n)!r}" for n in names if saved.get(n) != now.get(n)]

    def write(self, part: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write a part: complete or not at all. Raises NotWritten."""
        with writing(self._parts):
            write_atomic(self._part(part), "".join(map(as_line, rows)))

    def finish(self) -> dict[str, int]:
        """Join the parts into the file; returns `counts` of its rows. Raises NotWritten."""
        found = counts(self.rows())
        if self.path.exists():
            raise UserError(f"--out={self.path} exists by now; nothing was overwritten; the rows are in {self._parts}")
        with writing(self.path), _replacing(self.path) as made:
            if self.path.suffix == ".jsonl":
                with open(made, "wb") as file:
                    for part in self._finished():
                        file.write(part.read_bytes())
            elif self.path.suffix == ".csv":
                write_csv(made, self.rows)
            else:
                write_parquet(made, self.rows, {**self._columns, "error": pa.string()})
            write_json(self._about, self._provenance | found)
        shutil.rmtree(self._parts, ignore_errors=True)
        return found

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of all finished parts."""
        for part in self._finished():
            with open(part, encoding="utf-8") as lines:
                yield from map(json.loads, lines)

    def _part(self, number: int) -> Path:
        return self._parts / f"{number:06d}.jsonl"

    def _finished(self) -> list[Path]:
        """The parts before the first that is missing."""
        found: list[Path] = []
        while (path := self._part(len(found))).is_file():
            found.append(path)
        return found


def counts(rows: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """The number of rows, of those with an error, and of those that were truncated."""
    found = dict.fromkeys(RESULTS, 0)
    for row in rows:
        for name, counted in zip(RESULTS, (True, row["error"] is not None, row.get("truncated")), strict=True):
            found[name] += bool(counted)
    return found


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows to standard output as JSON lines."""
    sys.stdout.write("".join(map(as_line, rows)))
    sys.stdout.flush()


def as_line(row: Mapping[str, Any]) -> str:
    """A row as a line of JSON; values that JSON lacks, such as dates, become texts, and half characters "?"."""
    return json.dumps(row, ensure_ascii=False, default=str).encode(errors="replace").decode() + "\n"


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file that becomes `path` at the end, or is removed after an exception."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise

"""The progress of tokenizing: a bar on a terminal, and lines in a log."""

import contextlib
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import rich.console
import rich.markup
import rich.progress
from rich.table import Column
from rich.text import Text

from llm3.errors import counted

SECONDS_BETWEEN_LINES = 60.0  # of the progress in a log


class Counts:
    """Documents and UTF-8 bytes encoded so far in each part: int64 [parts, 2] in memory that worker processes share.

    No lock is needed: a part is built by one process.
    """

    def __init__(self, parts: int):
        self._memory = multiprocessing.get_context("spawn").RawArray("q", 2 * parts)

    def add(self, part: int, documents: int, text_bytes: int) -> None:
        self._memory[2 * part] += documents
        self._memory[2 * part + 1] += text_bytes

    def __str__(self) -> str:
        documents, text_bytes = np.frombuffer(self._memory, np.int64).reshape(-1, 2).sum(axis=0).tolist()
        return f"{counted(documents, 'document')}, {text_bytes / 1e6:,.1f} MB"


@contextlib.contextmanager
def show_progress(what: str, parts: int, done: Counts, bar: bool | None) -> Iterator[Callable[[], None]]:
    """Yield a function to call after each part: a bar on a terminal; elsewhere a line, and another one a minute."""
    console = rich.console.Console(stderr=True)
    if bar is None:
        bar = console.is_terminal
    if not bar:
        print(what, file=sys.stderr)
        yield _a_line_a_minute(what, done)
        return
    columns = (
        rich.progress.TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis")),
        rich.progress.BarColumn(bar_width=10),
        CountsColumn(done),
        rich.progress.TimeElapsedColumn(),
    )
    with rich.progress.Progress(*columns, console=console, transient=True) as shown:
        # how much of a single part is done is not known
        task = shown.add_task(rich.markup.escape(what), total=parts if parts > 1 else None)
        yield lambda: shown.advance(task)


class CountsColumn(rich.progress.ProgressColumn):
    """The documents and bytes encoded so far."""

    def __init__(self, done: Counts):
        super().__init__(Column(no_wrap=True))
        self._done = done

    def render(self, task: rich.progress.Task) -> Text:
        return Text(str(self._done))


def _a_line_a_minute(what: str, done: Counts, clock: Callable[[], float] = time.monotonic) -> Callable[[], None]:
    last = clock()

    def after_a_part() -> None:
        nonlocal last
        if clock() - last >= SECONDS_BETWEEN_LINES:
            last = clock()
            print(f"{what}: {done}", file=sys.stderr, flush=True)

    return after_a_part

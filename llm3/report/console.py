"""The progress of a stage while it trains: a bar on a terminal, plain lines in a log."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from llm3.report.units import count, duration, percent

if TYPE_CHECKING:  # slow to import
    from rich import progress
    from rich.console import Console


def new_console(**options: Any) -> "Console":
    """A console that prints texts as they are: a path, a label or a reason may look like markup, as "[/x]" does."""
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False, **options)


class Progress:
    """The progress of one stage from step `start` to step `total`; `label` is the name of the stage.

    extra: {metric: its name in the line} of further metrics to show.

    On a terminal, a bar with the latest metrics; otherwise one line (at most 120 columns) per call of `log`. Use it as
    a context manager, or call `close`.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        label: str = "",
        console: "Console | None" = None,
        clock: Callable[[], float] = time.monotonic,
        extra: Mapping[str, str] = MappingProxyType({}),
    ):
        self._total, self._label, self._clock, self._extra = total, label, clock, extra
        self._first = (start, clock())  # a step and its time, the reference point for the ETA
        self._compiled = False
        self._bar: progress.Progress | None = None
        if console is not None or sys.stdout.isatty():
            self._bar, self._task = _bar(total, start, label, console)

    def log(self, step: int, metrics: dict) -> None:
        """Show `metrics` after `step` steps; missing metrics and None are not shown.

        Shown are loss, learning_rate, gradient_norm, tokens_per_second, mfu (fraction of the peak) and data_wait
        (fraction of the time spent waiting for data).
        """
        more = [f"{label} {metrics[key]:.4g}" for key, label in self._extra.items() if metrics.get(key) is not None]
        text = "  ".join([*_formatted(metrics), *more, *self._eta(step)])
        if self._bar is not None:
            self._bar.update(self._task, completed=step, metrics=text)
        else:
            width = len(str(self._total))
            print(f"{self._label:<10}{step:>{width}}/{self._total}  {text}", flush=True)

    def _eta(self, step: int) -> list[str]:
        first_step, first_time = self._first
        now, steps_left = self._clock(), self._total - step
        rate = (step - first_step) / (now - first_time) if now > first_time else 0.0
        if not self._compiled:  # exclude compilation, which falls before the first line
            self._first, self._compiled = (step, now), True
        return [f"ETA {duration(steps_left / rate)}"] if steps_left > 0 and rate > 0 else []

    def close(self) -> None:
        """Stop updating the bar; it stays on the screen."""
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


_FORMATS: dict[str, Callable[[float], str]] = {
    "loss": lambda value: f"loss {value:.4f}",
    "learning_rate": lambda value: f"lr {value:.2e}",
    "gradient_norm": lambda value: f"grad {value:.3g}",
    "tokens_per_second": lambda value: f"{count(value)} tok/s",
    "mfu": lambda value: f"MFU {percent(value)}",
    "data_wait": lambda value: f"wait {100 * value:.0f} %",
}


def _formatted(metrics: dict) -> list[str]:
    return [form(metrics[key]) for key, form in _FORMATS.items() if metrics.get(key) is not None]


def _bar(total: int, start: int, label: str, console: "Console | None") -> "tuple[progress.Progress, progress.TaskID]":
    """A running rich progress bar, and its task."""
    from rich import progress
    from rich.table import Column

    bar = progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=20),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[metrics]}", table_column=Column(overflow="ellipsis", no_wrap=True)),
        console=console,
    )
    task = bar.add_task(label, total=total, completed=start, metrics="")
    bar.start()
    return bar, task


SECONDS_BETWEEN_LINES = 30.0  # of a count that is written to a log


@contextmanager
def counting(
    total: int | None,
    label: str,
    unit: str = "",
    console: "Console | None" = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Callable[[int], None]]:
    """Count to `total` of a unit ("documents"); yields a function of the number that was done since its last call.

    total: None: not known. console: None: standard output. On a terminal, a bar that disappears at the end; otherwise a
    line every 30 seconds, so that a short count prints nothing.
    """
    if not (sys.stdout.isatty() if console is None else console.is_terminal):
        done, last, of = 0, clock(), "" if total is None else f" of {total:,}"

        def line(number: int) -> None:
            nonlocal done, last
            done += number
            if (now := clock()) - last >= SECONDS_BETWEEN_LINES:
                text = f"{label}: {done:,}{of} {unit}".rstrip()
                print(text, flush=True) if console is None else console.print(text)
                last = now

        yield line
        return
    from rich import progress

    bar = progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=20),
        progress.MofNCompleteColumn(),
        progress.TextColumn(unit),
        progress.TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
    )
    with bar:
        task = bar.add_task(label, total=total)
        yield lambda number: bar.advance(task, number)

"""What a stage shows while it trains: a progress bar on a terminal, plain lines in a log."""

import sys
import time

from llm3.report.units import count, duration, percent


class Progress:
    """The progress of one stage from step `start` to step `total`; `label` is its name.

    On a terminal a bar with the latest figures, elsewhere one line (at most 120 columns) for each call of `log`.
    Use it as a context manager, or call `close`.
    """

    def __init__(self, total: int, start: int = 0, label: str = "", console=None, clock=time.monotonic):
        self._total, self._label, self._clock = total, label, clock
        self._first = (start, clock())  # a step, and when it was reached: what the time left is estimated from
        self._compiled = False
        self._bar = None
        if console is not None or sys.stdout.isatty():
            self._bar, self._task = _bar(total, start, label, console)

    def log(self, step: int, metrics: dict) -> None:
        """Show `metrics` after `step` steps. Those that it knows, each left out where it is missing or None:

        loss, learning_rate, gradient_norm, tokens_per_second, mfu (share of the peak), data_wait (share of the time
        that is spent waiting for data).
        """
        figures = "  ".join([*_figures(metrics), *self._time_left(step)])
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=figures)
        else:
            width = len(str(self._total))
            print(f"{self._label:<10}{step:>{width}}/{self._total}  {figures}", flush=True)

    def _time_left(self, step: int) -> list[str]:
        first_step, first_time = self._first
        now, left = self._clock(), self._total - step
        rate = (step - first_step) / (now - first_time) if now > first_time else 0.0
        if not self._compiled:  # the steps up to the first line hold the compilation: estimate from here on
            self._first, self._compiled = (step, now), True
        return [f"ETA {duration(left / rate)}"] if left > 0 and rate > 0 else []

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


_FORMATS = {
    "loss": lambda value: f"loss {value:.4f}",
    "learning_rate": lambda value: f"lr {value:.2e}",
    "gradient_norm": lambda value: f"grad {value:.3g}",
    "tokens_per_second": lambda value: f"{count(value)} tok/s",
    "mfu": lambda value: f"MFU {percent(value)}",
    "data_wait": lambda value: f"wait {100 * value:.0f} %",
}


def _figures(metrics: dict) -> list[str]:
    return [show(metrics[key]) for key, show in _FORMATS.items() if metrics.get(key) is not None]


def _bar(total: int, start: int, label: str, console):
    """A running bar of rich, and its task."""
    from rich import progress
    from rich.table import Column

    bar = progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=20),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[figures]}", table_column=Column(overflow="ellipsis", no_wrap=True)),
        console=console,
    )
    task = bar.add_task(label, total=total, completed=start, figures="")
    bar.start()
    return bar, task

"""The progress of a stage while it trains: a live line on a terminal, plain lines in a log."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from llm3.files import shown
from llm3.report.units import count, duration, percent

if TYPE_CHECKING:  # slow to import
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.live import Live


WARNING = "bold yellow"  # the style of a line that a user should act on


def new_console(**options: Any) -> "Console":
    """A console that prints texts as they are: a path, a label or a reason may look like markup, as "[/x]" does.

    A terminal gets lines that break between words, a file or a pipe whole lines.
    """
    from rich.console import Console

    class Shown(Console):
        def print(self, *objects: Any, **style: Any) -> None:
            super().print(*(shown(each) if isinstance(each, str) else each for each in objects), **style)

    console = Shown(highlight=False, markup=False, emoji=False, **options)
    console.soft_wrap = not console.file.isatty()
    return console


class Progress:
    """The progress of one stage from step `start` to step `total`; `label` is the name of the stage.

    On a terminal, a live line as wide as the terminal is at the moment; otherwise one line of at most 120 columns for
    each call of `log`. The line has as many of its fields as fit, the most important first: label, step, loss,
    learning rate, tokens/s, ETA, the metrics of `extra`, gradient norm, MFU, data wait, and on a terminal a bar.

    extra: {key of a metric: its short label} of further metrics to show. console: where a live line is shown; its
    `print` puts lines above it. Use it as a context manager, or call `close`.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        label: str = "",
        console: "Console | None" = None,
        clock: Callable[[], float] = time.monotonic,
        extra: Mapping[str, str] | None = None,
    ):
        self._total, self._label, self._clock, self._step = total, label, clock, start
        self._first = (start, clock())  # a step and its time, the reference point for the ETA
        self._compiled = False
        forms = {key: partial("{} {:.4g}".format, short) for key, short in (extra or {}).items()}
        self._forms = IMPORTANT | {"eta": "ETA {}".format} | forms | FURTHER
        self._metrics: dict[str, Any] = {}
        self._live = live_display(self, console or new_console())

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Show `metrics` after `step` steps; a metric that is missing keeps its last value, and None is not shown.

        Shown are loss, learning_rate, gradient_norm, tokens_per_second, mfu (fraction of the peak), data_wait (fraction
        of the time spent waiting for data), and the metrics of `extra`.
        """
        self._step = step
        self._metrics |= {**metrics, "eta": self._eta(step)}
        if self._live is None:
            print(self.line(LOG_WIDTH), flush=True)

    def line(self, width: int) -> str:
        """The latest metrics in at most `width` columns."""
        place = len(str(self._total))
        text = f"{shortened(self._label, width // 4):<9} {self._step:>{place}}/{self._total}"
        for key, form in self._forms.items():
            if (value := self._metrics.get(key)) is None:
                continue
            if len(text) + 2 + len(field := form(value)) > width:
                break
            text += f"  {field}"
        return text

    def _eta(self, step: int) -> str | None:
        first_step, first_time = self._first
        now, steps_left = self._clock(), self._total - step
        rate = (step - first_step) / (now - first_time) if now > first_time else 0.0
        if not self._compiled:  # exclude compilation, which falls before the first line
            self._first, self._compiled = (step, now), True
        return duration(steps_left / rate) if steps_left > 0 and rate > 0 else None

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        """The line, as wide as the terminal is now, with a bar in front of it if there is room."""
        from rich.text import Text

        width = options.max_width
        text = Text(self.line(width), no_wrap=True, overflow="ellipsis")
        if (room := min(BAR_WIDTH, width - len(text) - 1)) >= BAR_WIDTH // 2:
            done = room * self._step // max(self._total, 1)
            full, rest = "#." if options.ascii_only else "━─"
            text = Text.assemble((full * done, "bar.complete"), (rest * (room - done), "bar.back"), " ", text)
        yield text

    def close(self) -> None:
        """Stop updating the line; it stays on the screen."""
        if self._live is not None:
            self._live.stop()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


LOG_WIDTH = 120
BAR_WIDTH = 20
IMPORTANT: dict[str, Callable[[Any], str]] = {
    "loss": "loss {:.4f}".format,
    "learning_rate": "lr {:.2e}".format,
    "tokens_per_second": lambda value: f"{count(value)} tok/s",
}
FURTHER: dict[str, Callable[[Any], str]] = {
    "gradient_norm": "grad {:.3g}".format,
    "mfu": lambda value: f"MFU {percent(value)}",
    "data_wait": lambda value: f"wait {100 * value:.0f} %",
}


def shortened(text: str, width: int) -> str:
    """The text, or its start and an ellipsis, in at most `width` characters."""
    return text if len(text) <= width else text[: max(width - 1, 0)] + "…"


def is_live(console: "Console") -> bool:
    """Whether a console can redraw its last line. FORCE_COLOR does not make a file a terminal."""
    return console.file.isatty() and not console.is_dumb_terminal


def live_display(renderable: Any, console: "Console") -> "Live | None":
    """A running live display of one line at the bottom of a terminal; None elsewhere."""
    if not is_live(console):
        return None
    from rich.live import Live

    # a standard error that is not this terminal keeps its lines
    live = Live(renderable, console=console, refresh_per_second=4, redirect_stderr=sys.stderr.isatty())
    live.start()
    return live


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

    total: None: not known. console: None: standard output. On a terminal, a bar that disappears at the end, below the
    line of a stage if both have the same console; otherwise a line every 30 seconds, so that a short count prints
    nothing.
    """
    console = console or new_console()
    if not is_live(console):
        done, last, of = 0, clock(), "" if total is None else f" of {total:,}"

        def line(number: int) -> None:
            nonlocal done, last
            done += number
            if (now := clock()) - last >= SECONDS_BETWEEN_LINES:
                text = f"{label}: {done:,}{of} {unit}".rstrip()
                console.print(text, soft_wrap=True)
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

"""Plots of a report in the colour-blind-safe palette of Okabe and Ito, drawn without a display: figures, and curves."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm3.report.units import words

if TYPE_CHECKING:  # slow to import
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#6B6B6B"
UNITS = ("nll", "bits_per_byte", "accuracy")  # of evaluations between steps, as their names end
COLOURS = (BLUE, ORANGE, GREEN, PURPLE)
PANELS = 3  # side by side at most

STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titlepad": 10,
    "axes.labelcolor": "#333333",
    "axes.labelsize": 10,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "font.family": "sans-serif",
    "figure.dpi": 150,
    "savefig.dpi": 150,
}


def row_sizes(panels: int, most: int) -> list[int]:
    """How many panels stand in each row of a figure, at most `most`: as even as possible, so that no slot is empty."""
    lines = math.ceil(panels / most)
    return [panels // lines + (line < panels % lines) for line in range(lines)]


@contextmanager
def figure(path: Path | str, panels: int, most: int, size: tuple[float, float]) -> "Iterator[list[Axes]]":
    """The axes of `panels` panels, at most `most` side by side, which are saved as a PNG at `path` at the end.

    size: of a panel in a full row, in inches; the panels of a row that has fewer are wider.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    sizes = row_sizes(panels, most)
    columns = math.lcm(*sizes)
    with rc_context(STYLE):
        drawing = Figure(figsize=(size[0] * sizes[0], size[1] * len(sizes)), layout="constrained")
        grid = drawing.add_gridspec(len(sizes), columns)
        axes = []
        for line, number in enumerate(sizes):
            width = columns // number
            axes += [drawing.add_subplot(grid[line, width * at : width * (at + 1)]) for at in range(number)]
        yield axes
        drawing.savefig(path)


def first_of_row(index: int, panels: int, most: int) -> bool:
    """Whether a panel stands at the left of its row."""
    return index in itertools.accumulate(row_sizes(panels, most), initial=0)


def smooth(values: Sequence[float], window: int) -> list[float]:
    """The mean over a centred window of `window` values, which is shorter at both ends."""
    half = window // 2
    parts = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def has_losses(histories: Mapping[str, list[dict]]) -> bool:
    """Whether a stage logged a finite loss."""
    return any(_points(lines, "loss") for lines in histories.values())


def plot_losses(path: Path | str, histories: Mapping[str, list[dict]]) -> None:
    """One panel per stage: the training loss (nats per target) by step, as logged and smoothed, and its validation.

    histories: {stage: lines of `read_metrics`}. Lines without a finite loss are dropped, as are stages without any such
    line. Several lines of one step are averaged before smoothing. Lines of evaluations: see `_validation`.
    """
    series = {stage: _points(lines, "loss") for stage, lines in histories.items()}
    series = {stage: points for stage, points in series.items() if points}
    with figure(path, len(series), PANELS, size=(4, 2.8)) as grid:
        for index, (axes, (stage, points)) in enumerate(zip(grid, series.items(), strict=True)):
            steps, losses = zip(*points, strict=True)
            axes.plot(steps, losses, ".", color=BLUE, alpha=0.35, markersize=6, markeredgewidth=0, label="train")
            steps, losses = zip(*_means(points), strict=True)
            axes.plot(steps, smooth(losses, len(losses) // 10 + 1), color=BLUE, linewidth=1.8, label="train, smoothed")
            drawn = [axes, *_validation(axes, histories[stage])]
            axes.set_title(stage)
            axes.set_xlabel("step")
            axes.set_xlim(left=0)
            if first_of_row(index, len(series), PANELS):
                axes.set_ylabel("loss (nats per target)")
            if index == 0 or len(drawn) > 1:
                handles = [handle for each in drawn for handle in each.get_legend_handles_labels()[0]]
                drawn[-1].legend(handles=handles, loc="upper right", frameon=True, framealpha=0.8, edgecolor="none")


def _validation(axes: "Axes", lines: list[dict]) -> "list[Axes]":
    """Draw the evaluations between the steps of a stage: nats on the axis of the loss, other units on a second one.

    That axis has bits per byte or, if there are none, accuracies. Returns it, if there is one.
    """
    keys = dict.fromkeys(key for line in lines if "loss" not in line for key in line)
    points = {key: _means(_points(lines, key)) for key in keys if not key.endswith("majority_accuracy")}
    found = {unit: [key for key in points if key.endswith(f"_{unit}") and points[key]] for unit in UNITS}
    shown = [*found["nll"], *(found["bits_per_byte"] or found["accuracy"])]
    second = axes.twinx() if len(shown) > len(found["nll"]) else None
    for index, key in enumerate(shown):
        own, colour = axes if second is None or key in found["nll"] else second, COLOURS[1 + index % 3]
        own.plot(*zip(*points[key], strict=True), "o-", color=colour, markersize=4, label=words(key))
    if second is None:
        return []
    second.spines["right"].set_visible(True)
    second.set_ylabel("bits per byte" if found["bits_per_byte"] else "accuracy")
    return [second]


def _points(lines: list[dict], key: str) -> list[tuple[int, float]]:
    """(step, value) of the lines whose value is finite."""
    return [(line["step"], line[key]) for line in lines if line.get(key) is not None and math.isfinite(line[key])]


def _means(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """One point per step: the mean of its values."""
    by_step: dict[int, list[float]] = {}
    for step, value in points:
        by_step.setdefault(step, []).append(value)
    return [(step, sum(values) / len(values)) for step, values in sorted(by_step.items())]

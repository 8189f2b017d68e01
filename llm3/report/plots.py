"""The plots of a report: PNG files, drawn without a display, in the colour-blind-safe palette of Okabe and Ito."""

import math
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from llm3.report.matrix import Metric, complete, majority, metrics_of
from llm3.report.replicates import Recipe, estimate
from llm3.report.table import METRIC_NAMES, PERCENTAGES
from llm3.report.units import words

if TYPE_CHECKING:  # slow to import
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#6B6B6B"
UNITS = ("nll", "bits_per_byte", "accuracy")  # of evaluations between steps, as their names end
COLOURS = (BLUE, ORANGE, GREEN, PURPLE)
Point = tuple[float, float, float]  # x, y, half of the error bar

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


def smooth(values: Sequence[float], window: int) -> list[float]:
    """The mean over a centred window of `window` values, which is shorter at both ends."""
    half = window // 2
    parts = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def plot_losses(path: Path | str, histories: dict[str, list[dict]]) -> None:
    """One panel per stage: the training loss (nats per target) by step, as logged and smoothed, and its validation.

    histories: {stage: lines of `read_metrics`}. Lines without a finite loss are dropped, as are stages without any such
    line. Several lines of one step are averaged before smoothing. Lines of evaluations: see `_validation`.
    """
    series = {stage: _points(lines, "loss") for stage, lines in histories.items()}
    series = {stage: points for stage, points in series.items() if points}
    columns = 2 if len(series) == 4 else min(max(len(series), 1), 3)
    lines = math.ceil(max(len(series), 1) / columns)
    with _figure(path, lines, columns, size=(4 * columns, 2.8 * lines)) as grid:
        for index, (axes, (stage, points)) in enumerate(zip(grid, series.items(), strict=False)):
            steps, losses = zip(*points, strict=True)
            axes.plot(steps, losses, ".", color=BLUE, alpha=0.35, markersize=6, markeredgewidth=0, label="train")
            steps, losses = zip(*_means(points), strict=True)
            axes.plot(steps, smooth(losses, len(losses) // 10 + 1), color=BLUE, linewidth=1.8, label="train, smoothed")
            drawn = [axes, *_validation(axes, histories[stage])]
            axes.set_title(stage)
            axes.set_xlabel("step")
            axes.set_xlim(left=0)
            if index % columns == 0:
                axes.set_ylabel("loss (nats per target)")
            if index == 0 or len(drawn) > 1:
                handles = [handle for each in drawn for handle in each.get_legend_handles_labels()[0]]
                drawn[-1].legend(handles=handles, loc="upper right", frameon=True, framealpha=0.8, edgecolor="none")
        for axes in grid[len(series) :]:
            axes.set_visible(False)


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


def plot_matrix(path: Path | str, rows: list[dict], baselines: list[dict]) -> None:
    """Bits per byte by stage in one panel, each other metric in its own, with the majority class; baselines are hollow.

    Panels are side by side if there are few stages. A bar that would dwarf the others (the untrained model) is cut off
    at the top of the panel. Raises ValueError for a metric that is not finite.
    """
    rows, baselines = complete(rows, baselines)
    found = metrics_of([*rows, *baselines])
    panels = [[metric for metric in found if metric.name == "bits_per_byte"]]
    panels += [[metric] for metric in found if metric.name != "bits_per_byte"]
    panels = [panel for panel in panels if panel]
    stages = len(rows) + len(baselines)
    columns = min(max(len(panels), 1), 3 if stages <= 6 else 1)
    lines = math.ceil(max(len(panels), 1) / columns)
    width = 4.0 if stages <= 6 else min(0.9 * stages, 16)
    with _figure(path, lines, columns, size=(width * columns, 3.2 * lines)) as grid:
        for axes, panel in zip(grid, panels, strict=False):
            _panel(axes, panel, rows, baselines)
        for axes in grid[len(panels) :]:
            axes.set_visible(False)


def _panel(axes: "Axes", panel: list[Metric], rows: list[dict], baselines: list[dict]) -> None:
    """A group of bars per stage, one bar per evaluation, labelled with their values."""
    stages, kind = [*rows, *baselines], panel[0].name
    share = kind in PERCENTAGES
    values = [[row[metric.key] for row in stages] for metric in panel]
    by_stage = [[value for value in stage if value is not None] for stage in zip(*values, strict=True)]
    top = _top(by_stage, cut=kind == "bits_per_byte")
    width = 0.8 / len(panel)
    for index, (metric, line) in enumerate(zip(panel, values, strict=True)):
        colour = COLOURS[index % len(COLOURS)]
        label = words(metric.evaluation) if len(panel) > 1 else None
        for position, value in enumerate(line):
            if value is None:
                continue
            x, hollow = position + (index - (len(panel) - 1) / 2) * width, position >= len(rows)
            fill = {"color": "white", "edgecolor": colour, "linewidth": 1.5} if hollow else {"color": colour}
            axes.bar(x, value, 0.9 * width, **fill, label=label)
            label = None
            text = f"{100 * value:.1f}" if share else f"{value:.2f}"
            height = min(value, 0.94 * top)
            paper = {"facecolor": "white", "edgecolor": "none", "pad": 1} if value > top else None
            axes.annotate(text, (x, height), (0, 2), textcoords="offset points", ha="center", fontsize=8, bbox=paper)
    chance = [majority(row, panel[0].evaluation) for row in stages] if kind == "accuracy" else []
    if any(value is not None for value in chance):
        level = next(value for value in chance if value is not None)
        axes.axhline(level, color=GREY, linewidth=1.2, linestyle="--", label="majority class")
        top = max(top, 1.3 * level)
    name = METRIC_NAMES.get(kind, words(kind))
    axes.set_title(
        "bits per byte (lower is better)" if kind == "bits_per_byte" else f"{words(panel[0].evaluation)}: {name}"
    )
    axes.set_ylabel(f"{name} (%)" if share else name)
    if share:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}")
        if top > 1:
            axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    names = [row["stage"] for row in stages]
    drawing, grid = axes.get_figure(root=True), axes.get_gridspec()
    assert drawing and grid
    inches = drawing.get_figwidth() / grid.ncols / len(names)  # available for the name of a stage
    slant: dict[str, Any] = {"rotation": 30, "ha": "right"} if inches < 0.08 * max(map(len, names)) else {}
    axes.set_xticks(range(len(stages)), names, **slant)
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.6, len(stages) - 0.4)
    axes.set_ylim(0, top)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper right" if kind == "bits_per_byte" else "upper left")


def plot_seeds(path: Path | str, recipes: list[Recipe]) -> None:
    """Each accuracy and each change of bits per byte by the number of trained parameters, one point per recipe.

    Error bars are the 95 % intervals over the seeds (`llm3.report.replicates.estimate`).
    """
    found = metrics_of([row for recipe in recipes for row in recipe.rows])
    panels = [(metric, metric.key) for metric in found if metric.name == "accuracy"]
    panels += [(metric, f"{metric.key}_change") for metric in found if metric.name == "bits_per_byte"]
    panels = [(metric, key) for metric, key in panels if any(estimate(recipe.over_seeds(key)) for recipe in recipes)]
    columns = min(max(len(panels), 1), 3)
    lines = math.ceil(max(len(panels), 1) / columns)
    with _figure(path, lines, columns, size=(4.6 * columns, 3.6 * lines)) as grid:
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        drawn = [(axes, _seeds_panel(axes, *panel, recipes)) for axes, panel in zip(grid, panels, strict=False)]
        drawing = grid[0].get_figure(root=True)
        assert drawing
        drawing.draw_without_rendering()  # labels are placed after the panels have their final size
        for axes, points in drawn:
            _label(axes, points)


def _seeds_panel(axes: "Axes", metric: Metric, key: str, recipes: list[Recipe]) -> dict[str, Point]:
    """Plot mean and interval of one metric per recipe; returns {label: point}."""
    share = metric.name == "accuracy"
    scale, points = 100 if share else 1, {}
    for recipe in recipes:
        if (found := estimate(recipe.over_seeds(key))) is not None:
            trained = recipe.rows[0]["trainable_params"]
            points[recipe.label] = (trained, scale * found.mean, scale * found.half_width)
    for x, y, half in points.values():
        axes.errorbar(x, y, half, fmt="o", color=BLUE, markersize=5, capsize=3)
    chance = majority(recipes[0].rows[0], metric.evaluation) if share else 0.0
    if chance is not None:
        name = "majority class" if share else "the parent"
        axes.axhline(scale * chance, color=GREY, linewidth=1.2, linestyle="--", label=name)
    axes.set_xscale("log")
    axes.margins(x=0.2, y=0.15)
    axes.set_xlabel("trained parameters")
    unit = "accuracy (%)" if share else f"change of {METRIC_NAMES[metric.name]}"
    axes.set_title(f"{words(metric.evaluation)}: {unit}")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best")
    return points


def _label(axes: "Axes", points: dict[str, Point]) -> None:
    """Label each point where the label hides no other label, point or bar."""
    from matplotlib.transforms import Bbox

    pixel = axes.figure.dpi / 72
    taken = []
    for x, y, half in points.values():
        (left, low), (_, high) = axes.transData.transform([(x, y - half), (x, y + half)])
        taken.append(Bbox([[left - 4 * pixel, low - 2 * pixel], [left + 4 * pixel, high + 2 * pixel]]))
    for line in (each for each in axes.lines if each.get_linestyle() == "--"):
        taken.append(line.get_window_extent().padded(pixel))
    if legend := axes.get_legend():
        taken.append(legend.get_window_extent())
    for name, (x, y, half) in points.items():
        bar = abs(axes.transData.transform((x, y + half))[1] - axes.transData.transform((x, y))[1]) / pixel
        ends = [(0, bar + 4, "center", "bottom"), (0, -bar - 4, "center", "top")]
        sides = [(side * 7, up, "left" if side > 0 else "right", "center") for up in (0, 9, -9) for side in (1, -1)]
        text = axes.annotate(name, (x, y), (0, 0), textcoords="offset points", fontsize=8, in_layout=False)
        for right, up, horizontal, vertical in [*sides, *ends, sides[0]]:  # at the last position it may hide something
            text.set(position=(right, up), horizontalalignment=horizontal, verticalalignment=vertical)
            if not any(text.get_window_extent().overlaps(other) for other in taken):
                break
        taken.append(text.get_window_extent())


def _top(stages: list[list[float]], cut: bool) -> float:
    """The upper limit of an axis from 0, with room for a legend above the largest value.

    With `cut`, a stage with more than twice the values of all others is ignored.
    """
    peaks = sorted((max(values) for values in stages if values), reverse=True) or [1.0]
    peak = peaks[1] if cut and len(peaks) > 1 and peaks[0] > 2 * peaks[1] else peaks[0]
    return 1.3 * peak or 1.0


def _points(lines: list[dict], key: str) -> list[tuple[int, float]]:
    """(step, value) of the lines whose value is finite."""
    return [(line["step"], line[key]) for line in lines if line.get(key) is not None and math.isfinite(line[key])]


def _means(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """One point per step: the mean of its values."""
    by_step: dict[int, list[float]] = {}
    for step, value in points:
        by_step.setdefault(step, []).append(value)
    return [(step, sum(values) / len(values)) for step, values in sorted(by_step.items())]


class _figure:
    """A context with the axes of `lines` x `columns` panels, which are saved at `path` when it ends."""

    def __init__(self, path: Path | str, lines: int, columns: int, size: tuple[float, float]):
        from matplotlib import rc_context
        from matplotlib.figure import Figure as Drawing

        self._path = path
        self._style = rc_context(STYLE)
        self._style.__enter__()
        self._drawing = Drawing(figsize=size, layout="constrained")
        self._grid = self._drawing.subplots(lines, columns, squeeze=False)

    def __enter__(self) -> "list[Axes]":
        return list(self._grid.flat)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._drawing.savefig(self._path)
        finally:
            self._style.__exit__(kind, error, trace)

"""The plot of the matrix: metrics by stage, with their 95 % intervals."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm3.report.matrix import Metric, complete, majority, metrics_of
from llm3.report.plots import COLOURS, GREY, PANELS, figure
from llm3.report.table import METRIC_NAMES, PERCENTAGES
from llm3.report.units import words

if TYPE_CHECKING:  # slow to import
    from matplotlib.axes import Axes

Bounds = Mapping[tuple[str, str], tuple[float, float]]  # {(stage, key of a row): ends of its interval}


def plot_matrix(path: Path | str, rows: list[dict], baselines: list[dict], bounds: Bounds | None = None) -> None:
    """Bits per byte by stage in one panel, each other metric in its own, with the majority class; baselines are hollow.

    A stage that lacks all metrics of a panel has no place in it. A bar that would dwarf the others (the untrained
    model) is cut off at the top of the panel. Raises ValueError for a
    metric that is not finite.
    """
    rows, baselines = complete(rows, baselines)
    found = metrics_of([*rows, *baselines])
    panels = [[metric for metric in found if metric.name == "bits_per_byte"]]
    panels += [[metric] for metric in found if metric.name != "bits_per_byte"]
    panels = [panel for panel in panels if panel]
    stages = len(rows) + len(baselines)
    most, width = (PANELS, 4.0) if stages <= 6 else (1, min(0.9 * stages, 16))
    with figure(path, len(panels), most, size=(width, 3.2)) as grid:
        for axes, panel in zip(grid, panels, strict=True):
            kept, kept_baselines = (
                [row for row in part if any(row[metric.key] is not None for metric in panel)]
                for part in (rows, baselines)
            )
            _panel(axes, panel, kept, kept_baselines, bounds or {})


def _panel(axes: "Axes", panel: list[Metric], rows: list[dict], baselines: list[dict], bounds: Bounds) -> None:
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
            low, high = bounds.get((stages[position]["stage"], metric.key), (value, value))
            if high > low and value <= top:
                axes.plot([x, x], [low, min(high, top)], color="#333333", linewidth=1.2)
            text = f"{100 * value:.1f}" if share else f"{value:.2f}"
            height = min(max(value, high), 0.94 * top)
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


def _top(stages: list[list[float]], cut: bool) -> float:
    """The upper limit of an axis from 0, with room for a legend above the largest value.

    With `cut`, a stage with more than twice the values of all others is ignored.
    """
    peaks = sorted((max(values) for values in stages if values), reverse=True) or [1.0]
    peak = peaks[1] if cut and len(peaks) > 1 and peaks[0] > 2 * peaks[1] else peaks[0]
    return 1.3 * peak or 1.0

"""Dot plots: every seed of each row as a point, with the mean and its 95 % interval."""

from collections.abc import Sequence
from typing import NamedTuple

from llm3.report.plots.svg import (
    BLUE,
    GRID,
    MUTED,
    VERMILLION,
    Margins,
    figure,
    first_of_row,
    shortened,
    text_inches,
)

ROW_INCHES = 0.27


class Dots(NamedTuple):
    """The values of one row of a panel. mean: (mean, half the width of its interval), None: not known."""

    label: str
    values: list[float]
    mean: tuple[float, float] | None = None


class DotPanel(NamedTuple):
    """One quantity. reference: (value, name) of a dashed line."""

    x_name: str
    rows: list[Dots]
    reference: tuple[float, str] | None = None


def plot_dots(panels: Sequence[DotPanel], most: int = 3, width: float = 2.3) -> str:
    """The panels as SVG, their axes `width` inches wide; the rows of all panels are the same, the first at the top."""
    names = [shortened(each.label) for each in panels[0].rows]
    margins = Margins(left=max(map(text_inches, names)) + 0.15, right=0.25, bottom=0.48, top=0.28)
    with figure(len(panels), most, size=(width, ROW_INCHES * len(names) + 0.1), margins=margins) as drawing:
        for index, (axes, panel) in enumerate(zip(drawing.axes, panels, strict=True)):
            for line, row in enumerate(panel.rows):
                axes.plot(row.values, [line] * len(row.values), "o", color=VERMILLION, markersize=4, alpha=0.8)
                if row.mean is not None:
                    own = {"fmt": "|", "color": BLUE, "markersize": 9, "capsize": 3}
                    axes.errorbar(row.mean[0], line, xerr=row.mean[1], **own)  # type: ignore[arg-type]
            if panel.reference is not None:
                value, name = panel.reference
                axes.axvline(value, color=MUTED, linewidth=1, linestyle="--")
                where = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points", "fontsize": 7}
                axes.annotate(name, (value, 1), (0, 3), ha="center", color=MUTED, **where)  # type: ignore[arg-type]
            axes.set_yticks(range(len(names)), names if first_of_row(index, len(panels), most) else [""] * len(names))
            axes.tick_params(axis="y", length=0)
            axes.set_xlabel(panel.x_name)
            axes.locator_params(axis="x", nbins=5)
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.grid(color=GRID, linewidth=0.6)
            axes.set_axisbelow(True)
    return drawing.svg

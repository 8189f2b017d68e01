"""Lines over the values of one axis, with the interval of each point."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from llm3.report.plots.svg import GRID, MUTED, Look, Margins, figure, look, shortened, text_inches

if TYPE_CHECKING:  # slow to import
    from matplotlib.axes import Axes

HEIGHT = 2.3  # inches, of the axes
SPREAD = 0.18  # of the points at one place, as a share of the distance of places


class BandPoint(NamedTuple):
    """A value at a place with its interval, whose ends may be infinite."""

    place: int
    value: float
    low: float
    high: float
    filled: bool = True


class Band(NamedTuple):
    """A line."""

    label: str
    points: list[BandPoint]


class BandPanel(NamedTuple):
    """Lines on one pair of axes. places: the names of the values of the axis. zero: with the line of no difference."""

    title: str
    x_name: str
    y_name: str
    places: list[str]
    bands: list[Band]
    zero: bool = False


def plot_bands(panels: Sequence[BandPanel], most: int = 2) -> str:
    """The panels as SVG, each with its own legend below its axes."""
    longest = max(len(panel.bands) for panel in panels)
    wide = max(text_inches(shortened(place, 24)) for panel in panels for place in panel.places)
    ticks = 0.7 * wide if wide > 0.5 else 0.0  # long names are slanted
    margins = Margins(0.65, 0.2, 0.65 + 0.18 * longest + ticks, 0.35)
    with figure(len(panels), most, size=(3.6, HEIGHT), margins=margins) as drawing:
        for axes, panel in zip(drawing.axes, panels, strict=True):
            if panel.zero:
                axes.axhline(0, color=MUTED, linewidth=1, linestyle="--")
            for index, band in enumerate(panel.bands):
                middle = (len(panel.bands) - 1) / 2
                _draw(axes, band, look(index), SPREAD * (index - middle) / max(1, len(panel.bands) - 1))
            slant = {"rotation": 40, "ha": "right"} if ticks else {}
            axes.set_xticks(range(len(panel.places)), [shortened(each, 24) for each in panel.places], **slant)  # type: ignore[arg-type]
            axes.set_xlim(-0.4, len(panel.places) - 0.6)
            axes.set_title(panel.title)
            axes.set_xlabel(panel.x_name)
            axes.set_ylabel(panel.y_name)
            axes.grid(axis="y", color=GRID, linewidth=0.6)
            axes.set_axisbelow(True)
            below = -(0.42 + ticks) / HEIGHT
            axes.legend(loc="upper left", bbox_to_anchor=(0, below), handlelength=2.6, borderaxespad=0)
    return drawing.svg


def _draw(axes: "Axes", band: Band, own: Look, shift: float) -> None:
    """A band with its points, moved aside by `shift` so that those of other bands stay visible."""
    line = {"color": own.colour, "linestyle": own.dashes, "linewidth": 1.4}
    axes.plot([each.place + shift for each in band.points], [each.value for each in band.points], **line)
    axes.plot([], [], **line, marker=own.marker, markersize=5, label=shortened(band.label, 44))  # for the legend
    for place, value, low, high, filled in band.points:
        if math.isfinite(low) and math.isfinite(high):
            axes.plot([place + shift] * 2, [low, high], color=own.colour, linewidth=1.1)
        fill = own.colour if filled else "none"
        axes.plot(place + shift, value, own.marker, color=own.colour, markersize=5, markerfacecolor=fill)

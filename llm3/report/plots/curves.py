"""Curves over a shared axis, with the hand-offs between stages."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from llm3.report.plots.svg import GRID, MUTED, Look, Margins, figure, first_of_row, shortened, text_inches
from llm3.report.units import count

if TYPE_CHECKING:  # slow to import
    from matplotlib.axes import Axes

POINTS = 150  # of a curve at most; more are averaged


class Curve(NamedTuple):
    """One line. label: of the legend, "" for none. thin: a single seed. marked: with a marker at each point.

    aside: a baseline, dotted and with hollow markers.
    """

    label: str
    points: list[tuple[float, float]]
    look: Look
    thin: bool = False
    marked: bool = False
    aside: bool = False


class Panel(NamedTuple):
    """Curves on one pair of axes. handoffs: (x, name of what begins there)."""

    title: str
    x_name: str
    y_name: str
    curves: list[Curve]
    handoffs: list[tuple[float, str]]


def plot_curves(panels: Sequence[Panel], most: int = 2) -> str:
    """The panels as SVG, at most `most` side by side; the panels of a row have the same curves, and one legend."""
    margins = Margins(left=0.62, right=0.2, bottom=0.48, top=0.38)
    labels = [shortened(curve.label) for panel in panels for curve in panel.curves if curve.label]
    aside = max(map(text_inches, labels), default=0) + 0.6
    with figure(len(panels), most, (3.7, 2.0), margins, aside) as drawing:
        for index, (axes, panel) in enumerate(zip(drawing.axes, panels, strict=True)):
            _draw(axes, panel)
            if first_of_row(index, len(panels), most):
                axes.set_ylabel(panel.y_name)
            if first_of_row(index + 1, len(panels), most):
                axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), handlelength=2.6)
    return drawing.svg


def _draw(axes: "Axes", panel: Panel) -> None:
    for curve in panel.curves:
        x, y = zip(*thinned(curve.points), strict=True)
        own = curve.look
        axes.plot(
            x,
            y,
            color=own.colour,
            linestyle=":" if curve.aside else "-" if curve.thin else own.dashes,
            linewidth=0.7 if curve.thin else 1.8,
            alpha=0.6 if curve.thin else 1,
            marker=own.marker if curve.marked or len(x) == 1 else None,
            markersize=2.5 if curve.thin else 4.5,
            markerfacecolor="none" if curve.aside else own.colour,
            label=shortened(curve.label) if curve.label else None,
        )
    last = max((x for curve in panel.curves for x, _ in curve.points), default=0) or 1
    axes.set_xlim(0, 1.02 * last)
    for place, name in merged(panel.handoffs, 0.035 * last):
        if place:
            axes.axvline(place, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
        where = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points", "va": "top", "fontsize": 7}
        axes.annotate(shortened(name, 36), (place, 1), (2, -1), rotation=90, color=MUTED, **where)  # type: ignore[arg-type]
    axes.set_title(panel.title)
    axes.set_xlabel(panel.x_name)
    axes.xaxis.set_major_formatter(lambda value, _: count(value))
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)


def thinned(points: list[tuple[float, float]], most: int = POINTS) -> list[tuple[float, float]]:
    """The points as means of at most `most` groups of neighbours; the last point stays."""
    if len(points) <= most:
        return points
    groups = [points[at * len(points) // most : (at + 1) * len(points) // most] for at in range(most)]
    means = [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in groups]
    return [*means[:-1], points[-1]]


def merged(handoffs: list[tuple[float, str]], nearer: float) -> list[tuple[float, str]]:
    """The hand-offs, those nearer than this to the one before it together with it."""
    found: list[tuple[float, list[str]]] = []
    for x, name in sorted(handoffs):
        if found and x - found[-1][0] < nearer:
            found[-1][1].append(name)
        else:
            found.append((x, [name]))
    return [(x, ", ".join(dict.fromkeys(names))) for x, names in found]

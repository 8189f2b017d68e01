"""Quality against cost, with the Pareto front."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from llm3.report.plots.svg import BLUE, GRID, VERMILLION, Margins, figure, shortened, text_inches
from llm3.report.units import count

if TYPE_CHECKING:  # slow to import
    from matplotlib.axes import Axes


LABEL_WIDTH, LABEL_HEIGHT = 50, 8  # points


class Point(NamedTuple):
    """What can be chosen: its cost and its quality."""

    label: str
    cost: float
    quality: float


class TradeOff(NamedTuple):
    """The points of one measure of quality."""

    title: str
    cost_name: str
    points: list[Point]
    lower_is_better: bool = False
    percent: bool = False


def pareto_front(points: Sequence[Point], lower_is_better: bool = False) -> list[Point]:
    """The points that no other point beats: none is as cheap and better, or cheaper and as good. The cheapest first."""
    sign = -1 if lower_is_better else 1
    front: list[Point] = []
    for point in sorted(points, key=lambda each: (each.cost, -sign * each.quality)):
        if not front or sign * point.quality > sign * front[-1].quality:
            front.append(point)
    return front


def plot_trade_offs(panels: Sequence[TradeOff], most: int = 3) -> str:
    """A panel for each trade-off as SVG: the front as a line of filled points, the others hollow."""
    widest = max((text_inches(shortened(each.label, 18), 7) for panel in panels for each in panel.points), default=0.0)
    margins = Margins(left=0.62, right=max(0.62, widest), bottom=0.48, top=0.38)  # the last point may be at the end
    with figure(len(panels), most, size=(2.5, 2.1), margins=margins) as drawing:
        for axes, panel in zip(drawing.axes, panels, strict=True):
            front = pareto_front(panel.points, panel.lower_is_better)
            x, y = [each.cost for each in front], [each.quality for each in front]
            axes.plot(x, y, drawstyle="steps-post", color=BLUE, linewidth=1.2, label="Pareto front")
            axes.plot(x, y, "o", color=BLUE, markersize=6)
            others = [each for each in panel.points if each not in front]
            own = {"color": VERMILLION, "markersize": 5.5, "markerfacecolor": "none"}
            axes.plot([e.cost for e in others], [e.quality for e in others], "s", **own)  # type: ignore[arg-type]
            costs = [each.cost for each in panel.points]
            if min(costs) > 0 and max(costs) > 20 * min(costs):
                axes.set_xscale("log")
                axes.xaxis.set_minor_formatter(lambda value, _: "")
            axes.xaxis.set_major_formatter(lambda value, _: count(value))
            if panel.percent:
                axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}")
            axes.margins(x=0.1, y=0.18)
            axes.locator_params(axis="y", nbins=6)
            _label(axes, panel.points)
            axes.set_title(f"{panel.title} ({'lower' if panel.lower_is_better else 'higher'} is better)")
            axes.set_xlabel(panel.cost_name)
            axes.grid(color=GRID, linewidth=0.6)
            axes.set_axisbelow(True)
    return drawing.svg


def _label(axes: "Axes", points: Sequence[Point]) -> None:
    """Write the names of the points beside them, each at least a line below those that it would cover."""
    axes.autoscale_view()
    taken: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda each: -each.quality):
        x, y = axes.transData.transform((point.cost, point.quality))  # in points
        top = y + 4
        while any(abs(x - left) < LABEL_WIDTH and abs(top - line) < LABEL_HEIGHT for left, line in taken):
            top -= 1
        taken.append((x, top))
        place = (point.cost, point.quality)
        axes.annotate(shortened(point.label, 18), place, (6, top - y), textcoords="offset points", size=7)

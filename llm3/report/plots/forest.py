"""Forest plots: the interval of every comparison on one axis with the line of no difference."""

from collections.abc import Sequence
from typing import NamedTuple

from llm3.report.plots.svg import BLUE, GREEN, GRID, MUTED, VERMILLION, Margins, figure, shortened, text_inches

ROW_INCHES = 0.24


class Effect(NamedTuple):
    """A difference with its 95 % interval. verdict: -1 worse, 1 better, 0 not shown."""

    label: str
    value: float
    low: float
    high: float
    verdict: int = 0


class Forest(NamedTuple):
    """The effects in one metric. smallest: half the width of the band of differences that do not count; 0: none."""

    title: str
    x_name: str
    effects: list[Effect]
    smallest: float = 0.0
    scale: float = 1.0  # shown value / value


VERDICTS = {1: (GREEN, "^", True), -1: (VERMILLION, "v", True), 0: (BLUE, "o", False)}  # colour, marker, filled


def plot_forest(panels: Sequence[Forest]) -> str:
    """The panels as SVG, one below the other; filled triangles are differences beyond chance: up better, down worse."""
    longest = 52
    names = [shortened(each.label, longest) for panel in panels for each in panel.effects]
    most = max(len(panel.effects) for panel in panels)
    margins = Margins(left=max(map(text_inches, names)) + 0.15, right=0.3, bottom=0.48, top=0.32)
    with figure(len(panels), 1, size=(3.1, ROW_INCHES * most + 0.1), margins=margins) as drawing:
        for axes, panel in zip(drawing.axes, panels, strict=True):
            if panel.smallest:
                ends = panel.scale * panel.smallest
                axes.axvspan(-ends, ends, color=GRID, alpha=0.6, linewidth=0)
            axes.axvline(0, color=MUTED, linewidth=1, linestyle="--")
            for line, effect in enumerate(panel.effects):
                colour, marker, filled = VERDICTS[effect.verdict]
                low, value, high = (panel.scale * each for each in (effect.low, effect.value, effect.high))
                axes.plot([low, high], [line, line], color=colour, linewidth=1.6)
                fill = colour if filled else "none"
                axes.plot([value], [line], marker, color=colour, markersize=5.5, markerfacecolor=fill)
            labels = [shortened(each.label, longest) for each in panel.effects]
            axes.set_yticks(range(len(labels)), labels)
            axes.set_ylim(most - 0.4, -0.6)
            axes.tick_params(axis="y", length=0)
            axes.locator_params(axis="x", nbins=6)
            axes.set_title(panel.title)
            axes.set_xlabel(panel.x_name)
            axes.grid(axis="x", color=GRID, linewidth=0.6)
            axes.set_axisbelow(True)
    return drawing.svg

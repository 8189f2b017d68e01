"""The plot of replicates: every seed of every recipe, with the mean and its 95 % interval over the seeds."""

from pathlib import Path
from typing import TYPE_CHECKING

from llm3.report.matrix import majority, metrics_of
from llm3.report.plots import BLUE, GREY, ORANGE, PANELS, figure, first_of_row
from llm3.report.replicates import Recipe, estimate
from llm3.report.seeds import Quantity, quantities
from llm3.report.units import count

if TYPE_CHECKING:  # slow to import
    from matplotlib.axes import Axes


def plot_seeds(path: Path | str, recipes: list[Recipe]) -> None:
    """One panel per metric: a line for each recipe with its trained parameters, a point for each of its seeds."""
    rows = [row for recipe in recipes for row in recipe.rows]
    panels = [each for each in quantities(rows) if any(recipe.over_seeds(each.key) for recipe in recipes)]
    with figure(path, len(panels), PANELS, size=(4.2, 1.4 + 0.34 * len(recipes))) as grid:
        for index, (axes, quantity) in enumerate(zip(grid, panels, strict=True)):
            _panel(axes, quantity, recipes)
            names = [f"{recipe.label} ({count(recipe.rows[0]['trainable_params'])})" for recipe in recipes]
            axes.set_yticks(range(len(recipes)), names if first_of_row(index, len(panels), PANELS) else [])


def _panel(axes: "Axes", quantity: Quantity, recipes: list[Recipe]) -> None:
    """Points, means and intervals of one quantity, the first recipe at the top."""
    rows = [row for recipe in recipes for row in recipe.rows]
    for line, recipe in enumerate(recipes):
        values = [quantity.scale * each for each in recipe.over_seeds(quantity.key)]
        axes.plot(values, [line] * len(values), "o", color=ORANGE, markersize=5, alpha=0.9, markeredgewidth=0)
        if (found := estimate(values)) is not None:
            axes.errorbar(found.mean, line, xerr=found.half_width, fmt="|", color=BLUE, markersize=10, capsize=3)
    metric = next((each for each in metrics_of(rows) if each.key == quantity.key), None)
    chance = majority(rows[0], metric.evaluation) if metric and metric.name == "accuracy" else None
    if chance is not None:
        axes.axvline(quantity.scale * chance, color=GREY, linewidth=1.2, linestyle="--", label="majority class")
        axes.legend(loc="best")
    elif quantity.key.endswith("_change"):
        axes.axvline(0, color=GREY, linewidth=1.2, linestyle="--", label="the parent")
        axes.legend(loc="best")
    axes.set_xlabel(quantity.name)
    axes.set_ylim(len(recipes) - 0.5, -0.5)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)

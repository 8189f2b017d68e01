"""Plots of a classification: the confusion of its classes, and the calibration of its probabilities."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llm3.report.plots import BLUE, GREY, PANELS, figure, first_of_row
from llm3.report.statistics import Bin

if TYPE_CHECKING:  # slow to import
    from matplotlib.axes import Axes

SHOWN_CLASSES = 40  # more are no longer readable as names
SHOWN_COUNTS = 12  # with more classes, the cells have no numbers


def plot_confusion(path: Path | str, classes: list[str], counts: Mapping[str, np.ndarray]) -> None:
    """A heat map per stage: of the documents of a true class (a row), the share that is predicted as each class.

    counts: {stage: [true class, predicted class]}.
    """
    widest = PANELS if len(classes) <= SHOWN_COUNTS else 2
    most = max(number for number in range(1, widest + 1) if len(counts) % number == 0)  # square panels fill full rows
    cells = min(0.34 * max(len(classes), 4), 6)
    names = 0.08 * max(map(len, classes))
    with figure(path, len(counts), most, size=(cells + names + 1.9 / most + 0.5, cells + names + 0.9)) as grid:
        for index, (axes, (stage, table)) in enumerate(zip(grid, counts.items(), strict=True)):
            shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
            image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
            axes.set_title(stage)
            axes.set_xlabel("predicted class")
            axes.tick_params(length=0)
            shown = len(classes) <= SHOWN_CLASSES
            ticks = range(len(classes)) if shown else []
            left = first_of_row(index, len(counts), most)
            axes.set_xticks(ticks, classes if shown else [], rotation=45, ha="right", rotation_mode="anchor")
            axes.set_yticks(ticks if left else [], classes if shown and left else [])
            if left:
                axes.set_ylabel("true class")
            if len(classes) <= SHOWN_COUNTS:
                _annotate(axes, table, shares)
        drawing = grid[0].get_figure(root=True)
        assert drawing
        drawing.colorbar(image, ax=grid, shrink=0.7, label="share of the true class", fraction=0.03)


def _annotate(axes: "Axes", table: np.ndarray, shares: np.ndarray) -> None:
    for (row, column), number in np.ndenumerate(table):
        if number:
            colour = "white" if shares[row, column] > 0.5 else "#333333"
            axes.text(column, row, f"{number:g}", ha="center", va="center", fontsize=7, color=colour)


def plot_reliability(path: Path | str, bins: Mapping[str, list[Bin]], errors: Mapping[str, float]) -> None:
    """A reliability diagram per stage: the share of right answers by confidence, with Wilson's 95 % intervals.

    bins: {stage: from `llm3.report.statistics.reliability`}. errors: expected calibration errors, for the titles.
    """
    with figure(path, len(bins), PANELS, size=(3.4, 3.2)) as grid:
        for index, (axes, (stage, found)) in enumerate(zip(grid, bins.items(), strict=True)):
            axes.plot([0, 1], [0, 1], color=GREY, linewidth=1.2, linestyle="--", label="calibrated")
            total = sum(each.items for each in found)
            for each in found:
                low, high = (100 * end for end in (each.right.low, each.right.high))
                axes.plot([each.confidence] * 2, [low / 100, high / 100], color=BLUE, linewidth=1.2)
                area = 12 + 160 * each.items / total
                axes.scatter(each.confidence, each.right.value, s=area, color=BLUE, zorder=3, linewidths=0)
            axes.set_title(f"{stage} (ECE {errors[stage]:.3f})")
            axes.set_xlabel("confidence")
            axes.set_xlim(-0.02, 1.02)
            axes.set_ylim(-0.02, 1.02)
            if first_of_row(index, len(bins), PANELS):
                axes.set_ylabel("share of right answers")
            if index == 0:
                axes.legend(loc="lower right")

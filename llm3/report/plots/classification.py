"""Plots of a classification: the confusion of its classes, and the calibration of its probabilities."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from llm3.report.plots.heat_map import DARK, LIGHT, draw_cells
from llm3.report.plots.svg import BLUE, MUTED, Margins, figure, first_of_row, shortened, text_inches
from llm3.report.statistics import Bin

if TYPE_CHECKING:  # slow to import
    from matplotlib.axes import Axes

PANELS = 3  # side by side at most
SHOWN_CLASSES = 40  # more are no longer readable as names
SHOWN_CELLS = 12 * 12 * 4  # with more cells in all, they have no numbers


def plot_confusion(classes: list[str], counts: Mapping[str, np.ndarray]) -> str:
    """A heat map per stage: of the documents of a true class (a row), the share that is predicted as each class.

    counts: {stage: [true class, predicted class]}.
    """
    few = len(classes) ** 2 * len(counts) <= SHOWN_CELLS
    most = min(len(counts), PANELS if len(classes) <= 12 else 2)
    side = min(0.36 * max(len(classes), 4), 5)
    names = [shortened(each, 20) for each in classes] if len(classes) <= SHOWN_CLASSES else []
    space = max(map(text_inches, names), default=0)
    margins = Margins(left=space + 0.35, right=0.15, bottom=0.75 * space + 0.4, top=0.35)
    with figure(len(counts), most, size=(side, side), margins=margins) as drawing:
        for index, (axes, (stage, table)) in enumerate(zip(drawing.axes, counts.items(), strict=True)):
            shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
            if few:
                texts = [[f"{number:g}" if number else "" for number in line] for line in table]
                draw_cells(axes, shares.tolist(), texts, points=7)
            else:
                _pixels(axes, shares)
            axes.set_aspect("equal", anchor="NW")
            axes.set_title(shortened(stage))
            axes.set_xlabel("predicted class")
            axes.tick_params(length=0)
            axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
            first = first_of_row(index, len(counts), most)
            axes.set_yticks(range(len(names)) if first else [], names if first else [])
            if first:
                axes.set_ylabel("true class")
    return drawing.svg


def _pixels(axes: "Axes", shares: np.ndarray) -> None:
    """Draw many cells as an image in the colours of the heat map."""
    ends = np.array(LIGHT), np.array(DARK)
    image = ends[0] + shares[..., None] * (ends[1] - ends[0])
    axes.imshow(image.round().astype(np.uint8), interpolation="none")


def plot_reliability(bins: Mapping[str, list[Bin]], errors: Mapping[str, float]) -> str:
    """A reliability diagram per stage: the share of right answers by confidence, with Wilson's 95 % intervals.

    bins: {stage: from `llm3.report.statistics.reliability`}. errors: expected calibration errors, for the titles.
    """
    with figure(len(bins), min(len(bins), PANELS), size=(2.3, 2.1)) as drawing:
        for index, (axes, (stage, found)) in enumerate(zip(drawing.axes, bins.items(), strict=True)):
            axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle="--")
            total = sum(each.items for each in found)
            for each in found:
                ends = each.right.low, each.right.high
                axes.plot([each.confidence] * 2, ends, color=BLUE, linewidth=1.2)
                axes.plot(
                    each.confidence, each.right.value, "o", color=BLUE, markersize=3 + 9 * (each.items / total) ** 0.5
                )
            axes.set_title(f"{shortened(stage, 16)} (ECE {errors[stage]:.3f})")
            axes.set_xlabel("confidence")
            axes.set_xlim(-0.02, 1.02)
            axes.set_ylim(-0.02, 1.02)
            if first_of_row(index, len(bins), PANELS):
                axes.set_ylabel("share of right answers")
    return drawing.svg

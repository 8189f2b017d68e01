"""Loss and evaluations over all stages of a run, by the tokens and by the FLOPs since the first model."""

import math
from collections.abc import Sequence
from functools import partial

from llm3.report.material import Material
from llm3.report.matrix import Metric, comparable, metrics_of
from llm3.report.plots.curves import Curve, Panel, plot_curves
from llm3.report.plots.svg import look
from llm3.report.table import METRIC_NAMES, PERCENTAGES
from llm3.report.units import words

Points = list[tuple[float, float]]
UNITS = {"tokens": "tokens", "flops": "FLOPs"}

plot_progress = partial(plot_curves, most=2)


def ends(material: Material, unit: str) -> dict[str, float]:
    """{stage: cost of its training with that of all its ancestors}. unit: "tokens" or "flops"."""
    return {row["stage"]: _end(material, row, unit) for row in material.stages}


def _end(material: Material, row: dict, unit: str) -> float:
    if chain := row.get("chain"):
        return chain[unit] or 0.0
    total = row.get(unit) or 0.0
    for each in material.ancestors(row):
        if chain := each.get("chain"):
            return total + (chain[unit] or 0.0)
        total += each.get(unit) or 0.0
    return total


def progress(material: Material) -> list[Panel]:
    """The panels: loss, bits per byte and shares, each by tokens and by FLOPs; empty for a run without a loss."""
    if not any(points(lines, "loss") for lines in material.histories.values()):
        return []
    axes = [Axis(material, unit) for unit in UNITS]
    axes = [axis for axis in axes if axis.last] or [Axis(material, "step")]
    groups = [
        ("bits per byte", [each for each in metrics_of(material.stages) if each.name == "bits_per_byte"]),
        ("%", _shares(material)),
    ]
    made = [
        Panel("training loss", axis.name, "nats per target", _losses(material, axis), axis.handoffs) for axis in axes
    ]
    for unit, metrics in groups:
        for axis in axes if metrics and axes[0].last else []:
            curves = [each for index, metric in enumerate(metrics) for each in _metric(material, axis, metric, index)]
            if curves:
                title = "text, lower is better" if unit == "bits per byte" else "tasks"
                made.append(Panel(title, axis.name, unit, curves, axis.handoffs))
    return made


class Axis:
    """A horizontal axis over all stages. unit: "tokens" or "flops", else the steps of each stage by itself."""

    def __init__(self, material: Material, unit: str):
        self._material, self.unit = material, unit
        self.name = f"{UNITS[unit]} since the first model" if unit in UNITS else "step of the stage"
        self.end = ends(material, unit) if unit in UNITS else {}
        self.last = max(self.end.values(), default=0.0)
        rows = material.stages if self.last else []
        labels = {row["stage"]: recipe.label for recipe in material.recipes for row in recipe.rows}
        begun = {(self.start(row), labels.get(row["stage"], row["stage"])) for row in rows if row.get("tokens") != 0}
        self.handoffs = sorted(begun)

    def start(self, row: dict) -> float:
        """Where a stage begins: at the end of its parent."""
        if parent := self._material.parent(row):
            return self.end[parent["stage"]]
        return max(0.0, self.end.get(row["stage"], 0.0) - (row.get(self.unit) or 0.0))

    def place(self, row: dict, found: Points, steps: float) -> Points:
        """Points (step, value) of a stage on this axis; its FLOPs and tokens are the same in each step."""
        if not self.last:
            return found
        start, each = self.start(row), (row.get(self.unit) or 0.0) / (steps or 1)
        return [(start + step * each, value) for step, value in found]


def _rows_by_label(material: Material) -> dict[str, list[dict]]:
    label = {row["stage"]: recipe.label for recipe in material.recipes for row in recipe.rows}
    groups: dict[str, list[dict]] = {}
    for row in material.stages:
        groups.setdefault(label.get(row["stage"], row["stage"]), []).append(row)
    return groups


def _losses(material: Material, axis: Axis) -> list[Curve]:
    """The smoothed loss of each stage: every seed thin and their mean thick, if there are several."""
    curves: list[Curve] = []
    for index, (label, rows) in enumerate(_rows_by_label(material).items()):
        seeds = [points(material.histories.get(row["stage"], []), "loss") for row in rows]
        found = [(row, means(each)) for row, each in zip(rows, seeds, strict=True) if each]
        if not found:
            continue
        own, steps = look(index), max(each[-1][0] for _, each in found)
        for row, each in found if len(found) > 1 else []:
            curves.append(Curve("", axis.place(row, smoothed(each), steps), own, thin=True))
        joined = means([point for _, each in found for point in each])
        curves.append(Curve(label, axis.place(found[0][0], smoothed(joined), steps), own))
    return curves


def _shares(material: Material) -> list[Metric]:
    """The main metric of each task that is a share."""
    found: dict[str, Metric] = {}
    for metric in metrics_of(material.stages):
        if metric.name in PERCENTAGES:
            found.setdefault(metric.evaluation, metric)
    return list(found.values())


def _metric(material: Material, axis: Axis, metric: Metric, index: int) -> list[Curve]:
    """A line for each stage, from the value of its trained parent to its own, with evaluations between steps."""
    label, scale = f"{words(metric.evaluation)} {METRIC_NAMES.get(metric.name, words(metric.name))}", 1.0
    if metric.name in PERCENTAGES:
        scale = 100.0
    curves: list[Curve] = []
    for rows in _rows_by_label(material).values():
        aside = any(rows[0] is each for each in material.baselines)
        lines = [line for row in rows if (line := _line(material, axis, metric, row, scale))]
        several = len(lines) > 1
        for line in lines if several else []:
            curves.append(Curve("", line, look(index), thin=True, marked=True, aside=aside))
        if joined := means([point for line in lines for point in line]):
            name = "" if label in {each.label for each in curves} else label
            curves.append(Curve(name, joined, look(index), marked=True, aside=aside))
    return curves


def _line(material: Material, axis: Axis, metric: Metric, row: dict, scale: float) -> Points:
    if row[metric.key] is None or row.get("tokens") == 0:
        return []
    lines = material.histories.get(row["stage"], [])
    between = points([line for line in lines if "loss" not in line], metric.key)
    steps = max((line["step"] for line in lines), default=0)
    found = axis.place(row, [each for each in means(between) if each[0] < steps], steps)
    parent = material.parent(row)
    trained = parent and parent.get("tokens") != 0 and parent[metric.key] is not None
    if parent and trained and comparable(row, parent, metric.evaluation):
        found = [(axis.start(row), parent[metric.key]), *found]
    return [(x, scale * y) for x, y in [*found, (axis.end[row["stage"]], row[metric.key])]]


def points(lines: list[dict], key: str) -> Points:
    """(step, value) of the lines whose value is finite."""
    return [(line["step"], line[key]) for line in lines if line.get(key) is not None and math.isfinite(line[key])]


def means(found: Points) -> Points:
    """One point for each place: the mean of its values."""
    at: dict[float, list[float]] = {}
    for x, y in found:
        at.setdefault(x, []).append(y)
    return [(x, sum(values) / len(values)) for x, values in sorted(at.items())]


def smoothed(found: Points) -> Points:
    """The points with their values smoothed over a twentieth of them."""
    values = smooth([y for _, y in found], len(found) // 20 + 1)
    return [(x, y) for (x, _), y in zip(found, values, strict=True)]


def smooth(values: Sequence[float], window: int) -> list[float]:
    """The mean over a centred window of `window` values, which is shorter at both ends."""
    half = window // 2
    parts = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]

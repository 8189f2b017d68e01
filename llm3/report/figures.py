"""The figures of a report by name: those for which there is something to draw."""

from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np

from llm3.report import statistics
from llm3.report.comparisons import comparisons_of
from llm3.report.entries import classifiers, entries, evaluations_of, main_measure
from llm3.report.forgetting import forgetting_panels
from llm3.report.material import Material
from llm3.report.matrix import Metric, majority, metrics_of, on_other_data
from llm3.report.plots.classification import plot_confusion, plot_reliability
from llm3.report.plots.dots import DotPanel, Dots, plot_dots
from llm3.report.plots.forest import Effect, Forest, plot_forest
from llm3.report.plots.heat_map import plot_heat_map
from llm3.report.plots.lineage import Node, plot_lineage
from llm3.report.plots.trade_off import Point, TradeOff, plot_trade_offs
from llm3.report.progress import ends, plot_progress, progress
from llm3.report.replicates import estimate
from llm3.report.seeds import quantities
from llm3.report.statistics import Bin
from llm3.report.table import METRIC_NAMES, PERCENTAGES
from llm3.report.units import NOT_APPLICABLE, count, fixed, words

Draw = Callable[[], str]  # the text of an SVG


@lru_cache(maxsize=1)  # of the report that is being written: each section asks
def figures(material: Material) -> dict[str, Draw]:
    """{file name: function that draws it}."""
    found: dict[str, Draw] = {}
    if columns := metrics_of(material.stages):
        found["matrix.svg"] = partial(matrix_map, material, columns)
    if panels := trade_offs(material):
        found["cost.svg"] = partial(plot_trade_offs, panels)
    if forgotten := forgetting_panels(material):
        found["forgetting.svg"] = partial(plot_dots, forgotten)
    for evaluation in evaluations_of(material):
        if forests := forest_panels(material, evaluation):
            found[f"intervals_{evaluation}.svg"] = partial(plot_forest, forests)
        classes, counts = confusions(material, evaluation)
        if counts:
            found[f"confusion_{evaluation}.svg"] = partial(plot_confusion, classes, counts)
        if bins := reliabilities(material, evaluation):
            own = {entry.label: entry.mean(f"{evaluation}_ece") for entry in entries(material, evaluation)}
            errors = {name: own[name] or statistics.calibration_error(each) for name, each in bins.items()}
            found[f"reliability_{evaluation}.svg"] = partial(plot_reliability, bins, errors)
    if dots := seed_panels(material):
        found["seeds.svg"] = partial(plot_dots, dots)
    if curves := progress(material):
        found["progress.svg"] = partial(plot_progress, curves)
    if any(material.parent(row) for row in material.stages):
        found["lineage.svg"] = partial(plot_lineage, lineage(material))
    return found


def image(material: Material, name: str, title: str) -> list[str]:
    """The figure of this name as a part of the page; empty if there is nothing to draw."""
    return [f"![{title}](figures/{name})"] if name in figures(material) else []


def metric_name(metric: Metric) -> str:
    """A metric with its evaluation, for people."""
    return f"{words(metric.evaluation)} {METRIC_NAMES.get(metric.name, words(metric.name))}"


def matrix_map(material: Material, columns: list[Metric]) -> str:
    """The heat map of stages and metrics: in each column, from the worst to the best trained stage."""
    rows = [*material.shown, *material.shown_baselines]
    shade_of = [column_shades(rows, metric) for metric in columns]
    shades = [[column[at] for column in shade_of] for at in range(len(rows))]
    texts = [[_written(row[metric.key], metric) for metric in columns] for row in rows]
    heads = [metric_name(metric) + ", %" * (metric.name in PERCENTAGES) for metric in columns]
    return plot_heat_map([row["stage"] for row in rows], heads, shades, texts)


def column_shades(rows: list[dict], metric: Metric) -> list[float | None]:
    """0 for the worst and 1 for the best value of the trained stages; worse values of an untrained model are 0.

    None without a value, and for one that was measured on other data.
    """
    sign = -1 if metric.name.endswith("bits_per_byte") else 1
    shown = [row[metric.key] is not None and not on_other_data(row, metric.evaluation) for row in rows]
    known = [sign * row[metric.key] for row, has in zip(rows, shown, strict=True) if has]
    trained = [sign * row[metric.key] for row, has in zip(rows, shown, strict=True) if has and row.get("tokens") != 0]
    low, high = min(trained or known, default=0), max(known, default=0)
    span = (high - low) or 1.0
    return [
        max(0.0, (sign * row[metric.key] - low) / span if high > low else 0.5) if has else None
        for row, has in zip(rows, shown, strict=True)
    ]


def _written(value: float | None, metric: Metric) -> str:
    if value is None:
        return NOT_APPLICABLE
    return f"{100 * value:.1f}" if metric.name in PERCENTAGES else fixed(value)


def trade_offs(material: Material) -> list[TradeOff]:
    """For each evaluation, its main metric against the FLOPs of each stage with its ancestors."""
    cost = ends(material, "flops")
    panels = []
    for evaluation in evaluations_of(material):
        measure = main_measure(material, evaluation)
        points = []
        for entry in entries(material, evaluation):
            quality, costs = entry.mean(measure.key), [cost.get(row["stage"]) for row in entry.rows]
            known = [each for each in costs if each]
            if quality is not None and known and not entry.on_other_data(evaluation):
                points.append(Point(entry.label, sum(known) / len(known), quality))
        if len(points) > 1:
            title = f"{words(evaluation)} {measure.title}" + ", %" * measure.shares
            name = "training FLOPs, with ancestors"
            panels.append(TradeOff(title, name, points, measure.lower_is_better, measure.shares))
    return panels


def forest_panels(material: Material, evaluation: str) -> list[Forest]:
    """All comparisons of an evaluation, one panel for each metric."""
    panels = []
    for found in comparisons_of(material, evaluation):
        measure = found[0].measure
        effects = [
            Effect(
                f"{each.ours.label} - {each.theirs.label}",
                each.difference.value,
                each.difference.low,
                each.difference.high,
                (1 if each.better else -1) if each.significant else 0,
            )
            for each in found
        ]
        better = "lower" if measure.lower_is_better else "higher"
        unit = ", points" if measure.shares else ""
        name = f"difference in {measure.title}{unit} ({better} is better)"
        title = f"{words(evaluation)} {measure.title}"
        panels.append(Forest(title, name, effects, scale=100 if measure.shares else 1))
    return panels


def seed_panels(material: Material) -> list[DotPanel]:
    """Every seed of every recipe, one panel for each quantity but forgetting, which has its own figure."""
    recipes = material.recipes
    rows = [row for recipe in recipes for row in recipe.rows]
    panels = []
    for quantity in (each for each in quantities(rows) if not each.key.endswith("_change")):
        metric = next((each for each in metrics_of(rows) if each.key == quantity.key), None)
        chance = majority(rows[0], metric.evaluation) if metric and metric.name == "accuracy" else None
        dots = []
        for recipe in recipes:
            values = [quantity.scale * each for each in recipe.over_seeds(quantity.key)]
            found = estimate(values)
            label = f"{recipe.label} ({count(recipe.rows[0]['trainable_params'])})"
            dots.append(Dots(label, values, found and (found.mean, found.half_width)))
        reference = None if chance is None else (quantity.scale * chance, "majority class")
        panels.append(DotPanel(quantity.name, dots, reference))
    return panels


def confusions(material: Material, evaluation: str) -> tuple[list[str], dict[str, np.ndarray]]:
    """The classes of a classification, and for each stage or recipe the counts [true class, predicted class]."""
    classes: list[str] = []
    found: dict[str, np.ndarray] = {}
    for entry in entries(material, evaluation):
        tables = [(material.details.get(row["stage"]) or {}).get(f"{evaluation}_confusion") for row in entry.rows]
        known = [each for each in tables if each and each["classes"] == (classes or each["classes"])]
        if known:
            classes = known[0]["classes"]
            found[entry.label] = np.sum([each["counts"] for each in known], axis=0)
    return classes, found


def reliabilities(material: Material, evaluation: str) -> dict[str, list[Bin]]:
    """For each stage or recipe, right answers by confidence; the seeds of a recipe count together."""
    return {
        entry.label: statistics.reliability(columns["confidence"], columns["score"])
        for entry, columns in classifiers(material, evaluation)
        if "score" in columns and len(columns["score"])
    }


def lineage(material: Material) -> list[Node]:
    """A node for each stage or recipe, and for each first model that is not in the run."""
    label = {row["stage"]: row["stage"] for row in material.stages}
    label |= {row["stage"]: f"{each.label} x{len(each.rows)}" for each in material.recipes for row in each.rows}
    found: dict[str, Node] = {}
    for row in material.stages:
        parent = material.parent(row)
        before = (row.get("chain") or {}).get("stages") or [""]
        name = label[parent["stage"]] if parent else before[-1]
        if not parent and name:
            found.setdefault(name, Node(name, note="not in this run"))
        note = f"{count(row.get('tokens'))} tokens"
        if digest := row.get("params_digest"):
            note += f", {digest[:7]}"
        aside = any(row is each for each in material.baselines)
        found.setdefault(label[row["stage"]], Node(label[row["stage"]], name, note, aside))
    return list(found.values())


def task_section(material: Material) -> list[str]:
    """The confusion and the calibration of each classification."""
    parts: list[str] = []
    for evaluation in evaluations_of(material):
        name = words(evaluation).capitalize()
        if shown := image(material, f"confusion_{evaluation}.svg", f"{name}: confusion of the classes"):
            parts += [
                f"{name}: of the documents of a true class, the darker a cell, the larger the share that is predicted "
                "as this class.",
                *shown,
            ]
        if shown := image(material, f"reliability_{evaluation}.svg", f"{name}: accuracy by confidence"):
            parts += [
                f"{name}: the share of right answers by the confidence in the predicted class, with 95 % intervals. "
                "The area of a point is its share of the items, of all seeds of a recipe together; below the dashed "
                "line a stage is overconfident.",
                *shown,
            ]
    return ["## Confusion and calibration", *parts] if parts else []

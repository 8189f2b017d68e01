"""The plots of a report by file name: those for which there is something to draw."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from llm3.report import statistics
from llm3.report.comparisons import entry_interval
from llm3.report.entries import classifiers, entries, evaluations_of, measure_of
from llm3.report.material import Material
from llm3.report.matrix import metrics_of
from llm3.report.matrix_plot import plot_matrix
from llm3.report.plots import has_losses, plot_losses
from llm3.report.replicates import Recipe, estimate
from llm3.report.seeds_plot import plot_seeds
from llm3.report.statistics import Bin
from llm3.report.task_plots import plot_confusion, plot_reliability
from llm3.report.units import words

Draw = Callable[[Path], None]


def figures(material: Material) -> dict[str, Draw]:
    """{file name: function that draws it}."""
    found: dict[str, Draw] = {}
    if metrics_of(material.stages):
        found["matrix.png"] = lambda path: plot_matrix(path, material.shown, material.shown_baselines, bounds(material))
    histories = merged(material.histories, material.recipes)
    if has_losses(histories):
        found["loss.png"] = lambda path: plot_losses(path, histories)
    if material.recipes:
        found["seeds.png"] = lambda path: plot_seeds(path, material.recipes)
    for evaluation in evaluations_of(material):
        classes, counts = confusions(material, evaluation)
        if counts:
            found[f"confusion_{evaluation}.png"] = _confusion(classes, counts)
        if bins := reliabilities(material, evaluation):
            own = {entry.label: entry.mean(f"{evaluation}_ece") for entry in entries(material, evaluation)}
            errors = {name: own[name] or statistics.calibration_error(each) for name, each in bins.items()}
            found[f"reliability_{evaluation}.png"] = _reliability(bins, errors)
    return found


def _confusion(classes: list[str], counts: dict[str, np.ndarray]) -> Draw:
    return lambda path: plot_confusion(path, classes, counts)


def _reliability(bins: dict[str, list[Bin]], errors: dict[str, float]) -> Draw:
    return lambda path: plot_reliability(path, bins, errors)


def image(material: Material, name: str, title: str) -> list[str]:
    """The plot of this name as a part of the page; empty if there is nothing to draw."""
    return [f"![{title}]({name})"] if name in figures(material) else []


def merged(histories: Mapping[str, list[dict]], found: list[Recipe]) -> dict[str, list[dict]]:
    """The histories, with those of each recipe merged into one, sorted by step."""
    names = {row["stage"]: recipe.label for recipe in found for row in recipe.rows}
    joined: dict[str, list[dict]] = {}
    for stage, lines in histories.items():
        joined.setdefault(names.get(stage, stage), []).extend(lines)
    return {name: sorted(lines, key=lambda line: line["step"]) for name, lines in joined.items()}


def bounds(material: Material) -> dict[tuple[str, str], tuple[float, float]]:
    """{(stage, key): ends of the 95 % interval}: over the seeds of a row of means, else over the items."""
    found = {}
    for metric in metrics_of(material.stages):
        for entry in entries(material, metric.evaluation):
            if len(entry.rows) > 1:
                if over := estimate(list(entry.by_seed(metric.key).values())):
                    ends = (over.mean - over.half_width, over.mean + over.half_width)
                    found[f"{entry.label} x{len(entry.rows)}", metric.key] = ends
            elif inside := entry_interval(entry, measure_of(metric)):
                found[entry.label, metric.key] = (inside.low, inside.high)
    return found


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


def task_section(material: Material) -> list[str]:
    """The confusion and the calibration of each classification."""
    parts: list[str] = []
    for evaluation in evaluations_of(material):
        name = words(evaluation).capitalize()
        if shown := image(material, f"confusion_{evaluation}.png", f"{name}: confusion of the classes"):
            parts += [f"{name}: of the documents of a true class, the share that is predicted as each class.", *shown]
        if shown := image(material, f"reliability_{evaluation}.png", f"{name}: accuracy by confidence"):
            parts += [
                f"{name}: the share of right answers by the confidence in the predicted class, with 95 % intervals. "
                "The area of a point is its share of the items, of all seeds of a recipe together; below the dashed "
                "line a stage is overconfident.",
                *shown,
            ]
    return ["## Confusion and calibration", *parts] if parts else []

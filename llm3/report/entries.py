"""The stages in one evaluation: alone, or all seeds of a recipe together, with their results item by item."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from llm3.report import statistics
from llm3.report.material import Columns, Material
from llm3.report.matrix import Metric, metrics_of, on_other_data, standard_error
from llm3.report.statistics import Interval
from llm3.report.table import METRIC_NAMES, PERCENTAGES
from llm3.report.units import NOT_APPLICABLE, words

SHARES = ("accuracy", "exact_match", "acc")  # metrics that are the share of right items
TOLERANCE = 1e-3  # between a metric of a row, of float32 sums on devices, and the same from its predictions


class Measure(NamedTuple):
    """A metric of an evaluation that single items have: the sum of `values` over the sum of `weights`, or their mean.

    key: of the row. `values` and `weights` are functions of the columns of predictions.
    """

    key: str
    name: str
    shares: bool  # shown in percent
    lower_is_better: bool

    def values(self, columns: Columns) -> np.ndarray | None:
        """[items], or None if these predictions do not have what the metric is made of."""
        if self.name.endswith("bits_per_byte"):
            return columns["nats"] / math.log(2) if {"nats", "bytes"} <= columns.keys() else None
        if self.name == "brier":
            return _brier(columns)
        names = {"nll": "nats", "accuracy": "correct"}
        return columns.get(names.get(self.name, self.name), None if self.name == "nll" else columns.get("score"))

    def weights(self, columns: Columns) -> np.ndarray | None:
        """[items]: bytes, or the tokens of a document where the metric is one of tokens; None for the mean of items."""
        if self.name.endswith("bits_per_byte"):
            return columns.get("bytes")
        of_tokens = self.name == "nll" or (self.name == "accuracy" and "correct" in columns)
        return columns.get("tokens") if of_tokens else None

    @property
    def title(self) -> str:
        """The name for people."""
        return METRIC_NAMES.get(self.name, words(self.name))


class Entry(NamedTuple):
    """A stage, or the seeds of a recipe, in an evaluation. columns: the predictions of each row, None: not kept."""

    label: str
    rows: list[dict]
    columns: list[Columns | None]
    baseline: bool

    @property
    def kept(self) -> list[Columns] | None:
        """The predictions of all rows; None if any is missing."""
        found = [each for each in self.columns if each is not None]
        return found if len(found) == len(self.rows) else None

    def mean(self, key: str) -> float | None:
        """The mean of a key over the rows that have it; None without any."""
        values = [row[key] for row in self.rows if row.get(key) is not None]
        return sum(values) / len(values) if values else None

    def on_other_data(self, evaluation: str) -> bool:
        """Whether a row was measured on other data than most stages."""
        return any(on_other_data(row, evaluation) for row in self.rows)

    def by_seed(self, key: str) -> dict[Any, float]:
        """{seed: value}"""
        return {row.get("seed"): row[key] for row in self.rows if row.get(key) is not None}


class Items(NamedTuple):
    """The values of an entry by item, as means over its seeds, and their weights (None: each counts once)."""

    item: np.ndarray
    values: np.ndarray
    weights: np.ndarray | None


def evaluations_of(material: Material) -> list[str]:
    """The names of the evaluations with a metric in the table, tasks before texts."""
    found = metrics_of(material.stages)
    return list(dict.fromkeys(m.evaluation for m in sorted(found, key=lambda m: m.name.endswith("bits_per_byte"))))


def entries(material: Material, evaluation: str) -> list[Entry]:
    """The stages that have this evaluation, in the order of the run, replicates together, baselines last."""
    main = main_measure(material, evaluation)
    recipe_of = {id(row): recipe for recipe in material.recipes for row in recipe.rows}
    found: dict[str, Entry] = {}
    for row in (row for row in material.stages if row.get(main.key) is not None):
        recipe = recipe_of.get(id(row))
        label = recipe.label if recipe else row["stage"]
        if label not in found:
            baseline = not any(row is each for each in material.rows)
            rows = [each for each in recipe.rows if each.get(main.key) is not None] if recipe else [row]
            columns = [material.predictions(each["stage"], evaluation) for each in rows]
            found[label] = Entry(label, rows, columns, baseline)
    return list(found.values())


def main_measure(material: Material, evaluation: str) -> Measure:
    """The first metric of an evaluation in the table."""
    return measure_of(next(each for each in metrics_of(material.stages) if each.evaluation == evaluation))


def measure_of(metric: Metric) -> Measure:
    """A metric of the table as a measure."""
    return Measure(metric.key, metric.name, metric.name in PERCENTAGES, metric.lower_is_better)


def measures(material: Material, evaluation: str) -> list[Measure]:
    """The metrics of an evaluation that have a test: the main one, the likelihood of the truth, and others by item."""
    nll = Measure(f"{evaluation}_nll", "nll", False, True)
    main, *others = (measure_of(each) for each in metrics_of(material.stages) if each.evaluation == evaluation)
    columns = {name for row in material.stages for name in material.predictions(row["stage"], evaluation) or ()}
    known = [*[nll] * any(row.get(nll.key) is not None for row in material.stages)]
    return [main, *known, *(each for each in others if each.name in columns)]


def items(entry: Entry, measure: Measure) -> Items | None:
    """The values of an entry item by item; None if they were not kept, or do not make up the metric of the row."""
    if (kept := entry.kept) is None:
        return None
    shared, parts = None, []
    for row, columns in zip(entry.rows, kept, strict=True):
        values, weights = measure.values(columns), measure.weights(columns)
        if values is None or not _agrees(values, weights, row.get(measure.key)):
            return None
        order = np.argsort(columns["item"], kind="stable")
        item = columns["item"][order]
        if shared is not None and not np.array_equal(shared, item):
            return None
        shared = item
        parts.append((values[order].astype(np.float64), weights if weights is None else weights[order]))
    assert shared is not None
    return Items(shared, np.mean([values for values, _ in parts], axis=0), parts[0][1])


def _agrees(values: np.ndarray, weights: np.ndarray | None, expected: float | None) -> bool:
    total = len(values) if weights is None else weights.sum()
    return bool(len(values) and total) and agree(values.sum() / total, expected)


def agree(value: float, expected: float | None) -> bool:
    """Whether a metric that was computed from predictions is that of the row."""
    return expected is not None and abs(value - expected) <= TOLERANCE * max(1, abs(expected))


def interval(entry: Entry, measure: Measure) -> Interval | None:
    """The metric of an entry with its 95 % interval over the items; None if nothing is known of the items."""
    if (found := items(entry, measure)) is None:
        return _from_row(entry, measure)
    if found.weights is None and set(np.unique(found.values)) <= {0, 1}:
        return statistics.wilson(float(found.values.sum()), len(found.values))
    return statistics.ratio(found.values, found.weights)


def _from_row(entry: Entry, measure: Measure) -> Interval | None:
    """The interval of a share of right items, from a row alone."""
    row, number = entry.rows[0], entry.rows[0].get(f"{measure.key.removesuffix(f'_{measure.name}')}_items")
    if len(entry.rows) > 1 or measure.name not in SHARES or not number:
        return None
    return statistics.wilson(row[measure.key] * number, number)


def error(entry: Entry, measure: Measure) -> float | None:
    """The standard error over items of a single stage, from its row."""
    if f"{measure.key}_stderr" not in entry.rows[0] and measure.name not in SHARES:
        return None
    evaluation = measure.key.removesuffix(f"_{measure.name}")
    return standard_error(entry.rows[0], Metric(measure.key, evaluation, measure.name, measure.lower_is_better))


def written(value: float | None, measure: Measure, sign: str = "") -> str:
    """A value of a metric: in percent without the unit, else with three decimals."""
    if value is None:
        return NOT_APPLICABLE
    return f"{100 * value:{sign}.1f}" if measure.shares else f"{value:{sign}.3f}"


def bounds(found: Interval | None, measure: Measure) -> str:
    """An interval in brackets; empty without one."""
    return f" [{written(found.low, measure)}, {written(found.high, measure)}]" if found else ""


def item_count(entry: Entry, evaluation: str) -> int | None:
    """The number of items of an evaluation, from the predictions or the row."""
    if (kept := entry.kept) is not None:
        return len(kept[0]["item"])
    return entry.rows[0].get(f"{evaluation}_items")


def _brier(columns: Columns) -> np.ndarray | None:
    if not {"probabilities", "truth", "classes"} <= columns.keys():
        return None
    names = [str(name) for name in columns["classes"]]
    numbers = np.array([names.index(each) if each in names else -1 for each in columns["truth"]])
    return statistics.brier(columns["probabilities"], numbers)


def classifiers(material: Material, evaluation: str) -> Iterator[tuple[Entry, Columns]]:
    """The entries with one predicted class for each item, and their predictions, those of all seeds joined."""
    for entry in entries(material, evaluation):
        kept = entry.kept
        if kept is None or not all({"truth", "prediction", "confidence", "classes"} <= each.keys() for each in kept):
            continue
        joined = {name: np.concatenate([each[name] for each in kept]) for name in kept[0] if name != "classes"}
        yield entry, joined | {"classes": kept[0]["classes"]}

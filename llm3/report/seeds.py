"""The report section on replicates: means over seeds with confidence intervals."""

from collections.abc import Callable
from typing import NamedTuple

from llm3.report.material import Material
from llm3.report.matrix import metrics_of
from llm3.report.replicates import Estimate, Recipe, estimate
from llm3.report.table import METRIC_NAMES, PERCENTAGES, markdown_table
from llm3.report.units import NOT_APPLICABLE, count, words


class Quantity(NamedTuple):
    """A key of the rows, and how to show its values."""

    key: str
    name: str  # the head of the column
    scale: float  # shown value / value of the row
    write: Callable[[float], str]  # formats a scaled value


def quantities(rows: list[dict]) -> list[Quantity]:
    """The quantities to summarise: accuracies, macro F1, changes of bits per byte, and the step time."""
    shares, changes = [], []
    for metric in metrics_of(rows):
        evaluation, name = words(metric.evaluation), METRIC_NAMES.get(metric.name, words(metric.name))
        if metric.name in PERCENTAGES:
            shares.append(Quantity(metric.key, f"{evaluation} {name}, %", 100, "{:.1f}".format))
        elif metric.name == "bits_per_byte":
            head = f"change of {evaluation} {name}"
            changes.append(Quantity(f"{metric.key}_change", head, 1, "{:.3f}".format))
    every = [*shares, *changes, Quantity("step_seconds", "step time, ms", 1000, "{:.1f}".format)]
    return [each for each in every if any(row.get(each.key) is not None for row in rows)]


def section(material: Material) -> list[str]:
    """The report section "Over seeds": what the intervals cover, and the means; empty without replicates.

    The tests between recipes are in `llm3.report.comparisons`.
    """
    if not (found := material.recipes):
        return []
    inside = [row for recipe in found for row in recipe.rows]
    return ["## Over seeds", scope(inside), mean_table(found, quantities(inside))]


def scope(inside: list[dict]) -> str:
    """What the intervals cover, and what they do not."""
    parents = sorted({str(row["parent"]) for row in inside if row.get("parent")})
    one = f"one parent ({parents[0]})" if len(parents) == 1 else f"the parents {', '.join(parents)}"
    return (
        "Stages that differ only in their seed, as mean ± half of the 95 % interval (Student's t over the seeds). "
        "The interval covers only the fine-tuning seed, i.e. data order and new leaves: "
        f"all seeds start from {one if parents else 'the start in the config'} and are scored on the same items. "
        "Changes are relative to the parent; step times also depend on other load of the machine."
    )


def mean_table(found: list[Recipe], measured: list[Quantity]) -> str:
    """One line for each recipe."""
    lines = [
        [
            recipe.label,
            str(len(recipe.rows)),
            count(recipe.rows[0]["trainable_params"]),
            *(_cell(estimate(recipe.over_seeds(each.key)), each) for each in measured),
        ]
        for recipe in found
    ]
    return markdown_table(["recipe", "seeds", "trained", *(each.name for each in measured)], lines)


def _cell(found: Estimate | None, quantity: Quantity) -> str:
    if found is None:
        return NOT_APPLICABLE
    return f"{quantity.write(quantity.scale * found.mean)} ± {quantity.write(quantity.scale * found.half_width)}"

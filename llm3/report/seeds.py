"""The report section on replicates: means over seeds and differences paired by seed, with confidence intervals."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from llm3.report.matrix import majority, metrics_of, standard_error
from llm3.report.replicates import Estimate, Recipe, estimate, paired, recipes
from llm3.report.table import METRIC_NAMES, PERCENTAGES, markdown_table
from llm3.report.units import NOT_APPLICABLE, count, percent, words


class Quantity(NamedTuple):
    """A key of the rows, and how to show its values."""

    key: str
    name: str  # the head of the column
    scale: float  # shown value / value of the row
    unit: str
    write: Callable[[float], str]  # formats a scaled value


def quantities(rows: list[dict]) -> list[Quantity]:
    """The quantities to summarise: accuracies, macro F1, changes of bits per byte, and the step time."""
    shares, changes = [], []
    for metric in metrics_of(rows):
        evaluation, name = words(metric.evaluation), METRIC_NAMES.get(metric.name, words(metric.name))
        if metric.name in PERCENTAGES:
            shares.append(Quantity(metric.key, f"{evaluation} {name}, %", 100, "points", "{:.1f}".format))
        elif metric.name == "bits_per_byte":
            head = f"change of {evaluation} {name}"
            changes.append(Quantity(f"{metric.key}_change", head, 1, name, "{:.3f}".format))
    every = [*shares, *changes, Quantity("step_seconds", "step time, ms", 1000, "ms", "{:.1f}".format)]
    return [each for each in every if any(row.get(each.key) is not None for row in rows)]


def section(rows: list[dict]) -> list[str]:
    """The parts of the report section "Over seeds"; empty without replicates. rows: as returned by `complete`."""
    if not (found := recipes(rows)):
        return []
    inside = [row for recipe in found for row in recipe.rows]
    measured = quantities(inside)
    parts = ["## Over seeds", " ".join(scope(found, inside)), mean_table(found, measured)]
    reference, *others = found
    if others and measured:
        parts.append(f"Differences from {reference.label}, paired by seed:")
        parts.append(difference_table(reference, others, measured))
        parts.append("\n".join(f"- {line}" for line in verdicts(reference, others, measured)))
    return parts


def scope(found: list[Recipe], inside: list[dict]) -> Iterator[str]:
    """Sentences that say what the intervals cover, and what they do not."""
    parents = sorted({str(row["parent"]) for row in inside if row.get("parent")})
    one = f"one parent ({parents[0]})" if len(parents) == 1 else f"the parents {', '.join(parents)}"
    yield (
        "Stages that differ only in their seed, as mean ± half of the 95 % interval (Student's t over the seeds). "
        "The interval covers only the fine-tuning seed, i.e. data order and new leaves: "
        f"all seeds start from {one if parents else 'the start in the config'} and are scored on the same items. "
        "Changes are relative to the parent; step times also depend on other load of the machine."
    )
    for metric in (each for each in metrics_of(inside) if each.name == "accuracy"):
        known = [(row, error) for row in inside if (error := standard_error(row, metric)) is not None]
        if known:
            row, error = max(known, key=lambda pair: pair[0][metric.key])
            text = (
                f"{words(metric.evaluation).capitalize()} is scored on {row[f'{metric.evaluation}_items']} items: "
                f"other items would change an accuracy by about {100 * error:.1f} points "
                "(standard error)"
            )
            chance = majority(row, metric.evaluation)
            yield text + (f"; the majority class has {percent(chance)}." if chance is not None else ".")
    if len(found) > 2:
        yield f"The intervals are not corrected for comparing {len(found)} recipes."


def mean_table(found: list[Recipe], measured: list[Quantity]) -> str:
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


def difference_table(reference: Recipe, others: list[Recipe], measured: list[Quantity]) -> str:
    lines = [
        [recipe.label, *(_cell(paired(recipe, reference, each.key), each, "+") for each in measured)]
        for recipe in others
    ]
    return markdown_table(["recipe", *(each.name for each in measured)], lines)


def _cell(found: Estimate | None, quantity: Quantity, sign: str = "") -> str:
    if found is None:
        return NOT_APPLICABLE
    mean, half = quantity.scale * found.mean, quantity.scale * found.half_width
    plus = sign if mean >= 0 else ""
    return f"{plus}{quantity.write(mean)} ± {quantity.write(half)}"


def verdicts(reference: Recipe, others: list[Recipe], measured: list[Quantity]) -> Iterator[str]:
    """For each recipe, which differences from the reference are significant over the seeds, and which are not."""
    for recipe in others:
        shown, hidden = [], []
        for quantity in measured:
            found = paired(recipe, reference, quantity.key)
            if found is None:
                continue
            name = quantity.name.removesuffix(", %").removesuffix(", ms")
            if found.excludes_zero:
                way = "higher" if found.mean > 0 else "lower"
                text = quantity.write(abs(quantity.scale * found.mean))
                shown.append(f"{name} is {text} {quantity.unit} {way}")
            else:
                hidden.append(name)
        parts = [", ".join(shown)] if shown else []
        parts += [f"no significant difference in {', '.join(hidden)} (the interval includes 0)"] if hidden else []
        if parts:
            yield f"{recipe.label} compared with {reference.label}: {'; '.join(parts)}."

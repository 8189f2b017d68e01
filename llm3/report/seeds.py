"""The page's section on replicates: means over seeds, and differences paired by seed, with their intervals."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from llm3.report.matrix import figures, majority, standard_error
from llm3.report.replicates import Estimate, Recipe, estimate, paired, recipes
from llm3.report.table import METRIC_NAMES, PERCENTAGES, markdown_table
from llm3.report.units import NOT_APPLICABLE, count, percent, words


class Quantity(NamedTuple):
    """A key of the rows, its name as a column, and how a value of it is written."""

    key: str
    name: str
    scale: float
    unit: str
    write: Callable[[float], str]


def quantities(rows: list[dict]) -> list[Quantity]:
    """What is summarised of the rows: accuracies, macro F1, changes of bits per byte, and the time of a step."""
    shares, changes = [], []
    for figure in figures(rows):
        evaluation, metric = words(figure.evaluation), METRIC_NAMES.get(figure.metric, words(figure.metric))
        if figure.metric in PERCENTAGES:
            shares.append(Quantity(figure.key, f"{evaluation} {metric}, %", 100, "points", "{:.1f}".format))
        elif figure.metric == "bits_per_byte":
            name = f"change of {evaluation} {metric}"
            changes.append(Quantity(f"{figure.key}_change", name, 1, metric, "{:.3f}".format))
    every = [*shares, *changes, Quantity("step_seconds", "step time, ms", 1000, "ms", "{:.1f}".format)]
    return [each for each in every if any(row.get(each.key) is not None for row in rows)]


def section(rows: list[dict]) -> list[str]:
    """The parts of the page's section "Over seeds"; none without replicates. The rows are complete."""
    if not (found := recipes(rows)):
        return []
    inside = [row for recipe in found for row in recipe.rows]
    measured = quantities(inside)
    parts = ["## Over seeds", " ".join(scope(found, inside)), mean_table(found, measured)]
    reference, *others = found
    if others and measured:
        parts.append(f"Differences to {reference.label}, paired by seed:")
        parts.append(difference_table(reference, others, measured))
        parts.append("\n".join(f"- {line}" for line in verdicts(reference, others, measured)))
    return parts


def scope(found: list[Recipe], inside: list[dict]) -> Iterator[str]:
    """What the intervals are of, and what they leave out, in sentences."""
    parents = sorted({str(row["parent"]) for row in inside if row.get("parent")})
    one = f"one parent ({parents[0]})" if len(parents) == 1 else f"the parents {', '.join(parents)}"
    yield (
        "Stages that differ only by their seed, as mean ± half of the 95 % interval (Student's t over the seeds). "
        "The interval covers the seed of fine-tuning only, its order of data and its new leaves: "
        f"all seeds start from {one if parents else 'what the config says'} and are scored on the same items. "
        "A change is that since the parent; step times are also those of whatever else the machine did."
    )
    for figure in (each for each in figures(inside) if each.metric == "accuracy"):
        known = [row for row in inside if standard_error(row, figure) is not None]
        if known:
            row = max(known, key=lambda row: row[figure.key])
            text = (
                f"{words(figure.evaluation).capitalize()} is scored on {row[f'{figure.evaluation}_items']} items: "
                f"other items would move an accuracy by about {100 * standard_error(row, figure):.1f} points "
                "(standard error)"
            )
            chance = majority(row, figure.evaluation)
            yield text + (f"; the majority class has {percent(chance)}." if chance is not None else ".")
    if len(found) > 2:
        yield f"The intervals are not widened for comparing {len(found)} recipes."


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
    """For each recipe, which differences to the reference the seeds can show, and which they cannot."""
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
        parts += [f"no difference is shown in {', '.join(hidden)} (the interval includes 0)"] if hidden else []
        if parts:
            yield f"{recipe.label} against {reference.label}: {'; '.join(parts)}."

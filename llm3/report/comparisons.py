"""The section that compares all stages of an evaluation: intervals, differences with tests, and verdicts in words."""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from llm3.report import statistics
from llm3.report.entries import (
    Entry,
    Measure,
    agree,
    bounds,
    entries,
    error,
    evaluations_of,
    interval,
    item_count,
    items,
    main_measure,
    measures,
    written,
)
from llm3.report.material import Material
from llm3.report.matrix import comparable, majority
from llm3.report.replicates import estimate
from llm3.report.statistics import Difference
from llm3.report.table import markdown_table
from llm3.report.units import NOT_APPLICABLE, percent, words

SIGNIFICANT = 0.05
LEGEND = (
    "In brackets, 95 % intervals over the items: Wilson's for a share of right answers, else the bootstrap. ± is half "
    "of the 95 % interval over seeds (Student's t). Differences are paired item by item (McNemar's exact test of "
    "right and wrong answers, else the paired t test); where a side has several seeds, they are tested over the seeds, "
    "paired if both have the same ones. Where all differences are equal, which leaves the t test no spread, the sign "
    "test stands in for it. p is corrected for all tests of its table (Holm); below 0.05 a difference is called better "
    "or worse, and has a filled triangle in the plot. Tests over items say nothing about other seeds, and those over "
    "seeds nothing about other items."
)


class Comparison(NamedTuple):
    """The difference `ours` - `theirs` in one metric. p: of all comparisons of its table together (Holm)."""

    ours: Entry
    theirs: Entry
    measure: Measure
    difference: Difference
    p: float

    @property
    def significant(self) -> bool:
        """Whether the difference is shown beyond chance."""
        return self.p < SIGNIFICANT

    @property
    def better(self) -> bool:
        """Whether ours has the better value."""
        return (self.difference.value < 0) == self.measure.lower_is_better

    @property
    def verdict(self) -> str:
        """better, worse, or no difference shown."""
        if not self.significant:
            return "no difference shown"
        return "better" if self.better else "worse"

    @property
    def paired_over(self) -> str:
        """The unit of the pairs, with their number."""
        return f"{self.difference.pairs:,} {self.difference.unit}"

    def sentence(self) -> str:
        """The comparison in words, with the difference."""
        size = written(self.difference.value, self.measure, "+")
        unit = " points" if self.measure.shares else ""
        return f"{self.ours.label} against {self.theirs.label}: {size}{unit} {self.measure.title}, {self.verdict}"


def section(material: Material, plot: Callable[[str], list[str]] = lambda evaluation: []) -> list[str]:
    """For each evaluation: a table of its stages, a table of differences for each of its metrics, and their plot."""
    parts: list[str] = []
    for evaluation in evaluations_of(material):
        found = entries(material, evaluation)
        if len(found) < 2 and not any(each.kept for each in found):
            continue
        parts += [f"### {words(evaluation).capitalize()}", *described(material, evaluation, found)]
        parts.append(entry_table(material, evaluation, found))
        parts += map(difference_table, comparisons_of(material, evaluation))
        parts += plot(evaluation)
    return ["## The stages compared", LEGEND, *parts] if parts else []


def described(material: Material, evaluation: str, found: list[Entry]) -> Iterator[str]:
    """Sentences on the items, the constant answer and what is missing."""
    number, chance = item_count(found[-1], evaluation), majority(found[-1].rows[0], evaluation)
    known = [] if number is None else [f"{number:,} items"]
    if chance is not None and main_measure(material, evaluation).name == "accuracy":
        known.append(f"the most frequent class alone has {percent(chance)}")
    if known:
        yield f"{'; '.join(known).capitalize()}."
    if missing := [each.label for each in found if each.kept is None]:
        yield f"Predictions by item were not kept of {', '.join(missing)}: no paired tests over items there."


def entry_table(material: Material, evaluation: str, found: list[Entry]) -> str:
    """One line for each stage or recipe: its metrics with intervals, and the number of seeds."""
    columns = measures(material, evaluation)
    for name in ("macro_f1", "brier", "ece"):
        measure = Measure(f"{evaluation}_{name}", name, name == "macro_f1", name != "macro_f1")
        columns += [measure] * any(entry.mean(measure.key) is not None for entry in found)
    lines = [
        [
            f"*{entry.label}*" if entry.baseline else entry.label,
            str(len(entry.rows)),
            *(_cell(entry, each) for each in columns),
        ]
        for entry in found
    ]
    heads = [f"{each.title}, %" if each.shares else each.title for each in columns]
    return markdown_table(["stage", "seeds", *heads], lines)


def _cell(entry: Entry, measure: Measure) -> str:
    over = estimate(list(entry.by_seed(measure.key).values()))
    text = written(entry.mean(measure.key), measure)
    text += f" ± {written(over.half_width, measure)}" if over else ""
    return text + bounds(entry_interval(entry, measure), measure)


def entry_interval(entry: Entry, measure: Measure) -> statistics.Interval | None:
    """The interval over the items of any metric that has one."""
    if measure.name == "macro_f1":
        (kept, *others) = entry.kept or [{}]
        texts = {"truth", "prediction", "classes"} <= kept.keys() and not others
        found = statistics.macro_f1(kept["truth"], kept["prediction"]) if texts else None
        return found if found and agree(found.value, entry.mean(measure.key)) else None
    return None if measure.name == "ece" else interval(entry, measure)


def pairs(material: Material, found: list[Entry]) -> list[tuple[Entry, Entry]]:
    """What a reader compares, (ours, theirs): a stage with its parent; stages with one parent, or without a parent in
    this evaluation, with the first of them that trains all parameters; a baseline with the end of the main chain.
    """
    chain = [each for each in found if not each.baseline]
    chosen: list[tuple[Entry, Entry]] = []
    groups: dict[str, list[Entry]] = {}
    for entry in found:
        parent = material.parent(entry.rows[0])
        names = {parent["stage"]} if parent else set()
        before = next((each for each in found if any(row["stage"] in names for row in each.rows)), None)
        if before is not None:
            chosen.append((entry, before))
        if not entry.baseline:
            groups.setdefault(before.label if before else "", []).append(entry)
    for group in groups.values():
        chosen += [(entry, reference(group)) for entry in group if entry is not reference(group)]
    if chain:
        last = chain[-1] if len(chain[-1].rows) == 1 else reference([each for each in chain if len(each.rows) > 1])
        chosen += [(entry, last) for entry in found if entry.baseline]
    return list({(ours.label, theirs.label): (ours, theirs) for ours, theirs in chosen}.values())


def reference(group: list[Entry]) -> Entry:
    """The first entry that trains all parameters, else the first."""
    return min(group, key=lambda entry: entry.rows[0]["trainable_params"] != entry.rows[0]["params"])


def comparisons(material: Material, found: list[Entry], measure: Measure) -> list[Comparison]:
    """The differences that can be tested, with corrected p-values."""
    with_value = [each for each in found if each.mean(measure.key) is not None]
    evaluation = measure.key.removesuffix(f"_{measure.name}")
    known = [
        (ours, theirs, difference)
        for ours, theirs in pairs(material, with_value)
        if all(comparable(row, other, evaluation) for row in ours.rows for other in theirs.rows)
        and (difference := compare(ours, theirs, measure)) is not None
    ]
    corrected = statistics.holm([difference.p for *_, difference in known])
    return [
        Comparison(ours, theirs, measure, each, p) for (ours, theirs, each), p in zip(known, corrected, strict=True)
    ]


def comparisons_of(material: Material, evaluation: str) -> list[list[Comparison]]:
    """The comparisons in each metric of an evaluation that has any, the main metric first."""
    return _all_comparisons(material)[evaluation]


@lru_cache(maxsize=1)  # of the report that is being written: three sections and the plots show them
def _all_comparisons(material: Material) -> dict[str, list[list[Comparison]]]:
    made = {}
    for evaluation in evaluations_of(material):
        found = entries(material, evaluation)
        compared = (comparisons(material, found, measure) for measure in measures(material, evaluation))
        made[evaluation] = [each for each in compared if each]
    return made


def compare(ours: Entry, theirs: Entry, measure: Measure) -> Difference | None:
    """Over the seeds if a side has several, else paired by item, else from the standard errors of two stages.

    Two recipes are paired by seed; of a recipe and a single stage, each seed is compared with the stage.
    """
    if len(ours.rows) > 1 or len(theirs.rows) > 1:
        mine, other = ours.by_seed(measure.key), theirs.by_seed(measure.key)
        if len(ours.rows) > 1 and len(theirs.rows) > 1:
            return statistics.over_seeds([value - other[seed] for seed, value in mine.items() if seed in other])
        return statistics.over_seeds([value - each for value in mine.values() for each in other.values()])
    left, right = items(ours, measure), items(theirs, measure)
    if left is not None and right is not None:
        shared, first, second = np.intersect1d(left.item, right.item, return_indices=True)
        if len(shared) < max(len(left.item), len(right.item)):
            return None  # other documents
        weights = None if left.weights is None else left.weights[first]
        return statistics.paired(left.values[first], right.values[second], weights)
    if len(ours.rows) == len(theirs.rows) == 1:
        errors = [error(each, measure) for each in (ours, theirs)]
        number = ours.rows[0].get(f"{measure.key.removesuffix(f'_{measure.name}')}_items")
        if errors[0] is not None and errors[1] is not None and number:
            values = ours.rows[0][measure.key], theirs.rows[0][measure.key]
            return statistics.unpaired(*values, errors[0], errors[1], number)
    return None


def difference_table(compared: list[Comparison]) -> str:
    """One line for each comparison."""
    measure = compared[0].measure
    unit = ", points" if measure.shares else ""
    lines = [
        [
            f"{each.ours.label} - {each.theirs.label}",
            f"{written(each.difference.value, measure, '+')} "
            f"[{written(each.difference.low, measure, '+')}, {written(each.difference.high, measure, '+')}]",
            each.paired_over,
            each.difference.test,
            written_p(each.p),
            each.verdict,
        ]
        for each in compared
    ]
    heads = ["difference", f"{measure.title}{unit}", "pairs", "test", "p (Holm)", "verdict"]
    return markdown_table(heads, lines)


def written_p(p: float | None) -> str:
    """A p-value with two significant digits, or an upper bound."""
    if p is None:
        return NOT_APPLICABLE
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"

"""The first sentence of a report: what the stages reached, and which differences are shown."""

from collections.abc import Iterator

from llm3.report.comparisons import Comparison, comparisons_of
from llm3.report.entries import Entry, Measure, entries, evaluations_of, main_measure, written
from llm3.report.material import Material
from llm3.report.matrix import majority
from llm3.report.units import percent, words


def section(material: Material) -> list[str]:
    """One sentence: each task with its best stage, then each text with its change over the main chain."""
    parts = [
        text
        for evaluation in evaluations_of(material)
        for found in [[each for each in entries(material, evaluation) if not each.on_other_data(evaluation)]]
        for text in [_clause(material, evaluation, found, main_measure(material, evaluation))]
        if text
    ]
    return [f"**{'; '.join(parts)}.**"] if parts else []


def _clause(material: Material, evaluation: str, found: list[Entry], measure: Measure) -> str:
    if measure.name.endswith("bits_per_byte"):
        return _of_text(evaluation, found, measure)
    every = comparisons_of(material, evaluation)
    compared = [each for group in every for each in group if each.measure == measure]
    return _of_task(evaluation, found, measure, compared)


def _of_text(evaluation: str, found: list[Entry], measure: Measure) -> str:
    """The values of the single stages of the main chain, one after another."""
    chain = [each for each in found if not each.baseline and len(each.rows) == 1]
    if len(chain) < 2:
        return ""
    steps = " → ".join(f"{written(each.mean(measure.key), measure)} ({each.label})" for each in chain)
    return f"{words(evaluation)} text costs {steps} {measure.title}"


def _of_task(evaluation: str, found: list[Entry], measure: Measure, compared: list[Comparison]) -> str:
    """The best mean of a task, and how it compares with the others."""
    sign, word = (-1, "lowest") if measure.lower_is_better else (1, "highest")
    best = max(found, key=lambda entry: sign * (entry.mean(measure.key) or 0.0))
    value = written(best.mean(measure.key), measure) + " %" * measure.shares
    text = f"{words(evaluation)}: {best.label} has the {word} {measure.title}, {value}"
    if len(best.rows) > 1:
        text += f" (mean of {len(best.rows)} seeds)"
    if measure.name == "accuracy" and (chance := majority(best.rows[0], evaluation)) is not None:
        text += f", where the most frequent class has {percent(chance)}"
    return text + "".join(_outcome(best, compared))


def _outcome(best: Entry, compared: list[Comparison]) -> Iterator[str]:
    """Which of the comparisons with the best entry show a difference."""
    others: dict[bool, list[str]] = {True: [], False: []}
    for each in compared:
        if best.label in (each.ours.label, each.theirs.label):
            others[each.significant].append((each.theirs if each.ours.label == best.label else each.ours).label)
    if others[True]:
        yield f"; better than {_listed(others[True])} beyond chance"
    if others[False]:
        yield f"{', but' if others[True] else ';'} no difference from {_listed(others[False])} is shown"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"

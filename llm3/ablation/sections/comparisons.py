"""The comparisons of an ablation: their table, their intervals as a forest plot, and the literature."""

import math
from collections.abc import Callable, Iterator, Sequence

from llm3.ablation import power
from llm3.ablation.analysis import Analysis, Result, by_name
from llm3.ablation.metrics import direction, number_text, scale_of
from llm3.ablation.sections.parts import Figure, Part, table
from llm3.ablation.verdicts import CONFIRMED, REFUTED, UNDECIDED
from llm3.errors import counted
from llm3.report.escape import escaped
from llm3.report.plots.forest import Effect, Forest, plot_forest
from llm3.report.units import NOT_APPLICABLE

MOST_FOREST = 60  # comparisons in the forest plot
LITERATURE = {CONFIRMED: "agrees", REFUTED: "disagrees", UNDECIDED: "undecided"}
POWER = (
    "Smallest: the smallest difference that counts. SD for 80 %: before the runs, the largest standard deviation of "
    "the difference over seeds with which the planned seeds find it with a power of 80 %. Power: after the runs, to "
    "find it with the variance that was found."
)


def section(analysis: Analysis) -> Iterator[Part]:
    """The table of comparisons, their intervals, and what the results hold for."""
    if not analysis.results:
        return
    yield "## Comparisons"
    yield table(*comparisons_table(analysis))
    yield escaped(legend(analysis))
    if forests := list(forest_panels(analysis.results[:MOST_FOREST])):
        yield Figure("comparisons", "Differences with their 95 % intervals", plot_forest(forests))
        yield (
            "Filled triangles are differences that are shown beyond chance (up: better, down: worse); hollow circles "
            "are not. The grey band holds differences that are too small to count, if a smallest one was declared."
        )
    if len(analysis.results) > MOST_FOREST:
        yield f"The plot has the first {MOST_FOREST} of {len(analysis.results)} comparisons."


def legend(analysis: Analysis) -> str:
    """How to read the table of comparisons."""
    results = analysis.results
    effects = [each.effect for each in results if each.effect is not None]
    covers, tests = dict.fromkeys(each.covers for each in effects), dict.fromkeys(each.test for each in effects)
    parts = [
        "Differences are ours minus theirs, paired by seed, and by item where both answered the same items; in "
        "brackets, 95 % intervals that are not adjusted for other comparisons.",
        f"They hold for {' or for '.join(covers)}." if covers else "",
        f"Tests: {'; '.join(tests)}." if tests else "",
        f"p is adjusted by Holm for {counted(analysis.tests, 'test')}; only p up to {power.ALPHA:g} calls two arms "
        "different.",
        "With one seed nothing is decided, whatever the interval." if any(len(r.seeds) == 1 for r in results) else "",
        POWER if any(each.pair.declared.smallest for each in results) else "",
        "To decide: about how many seeds would decide what is undecided."
        if any(each.verdict and each.verdict.seeds_to_decide for each in results)
        else "",
        "Declared after: how many chains of the two arms were finished when the comparison was first declared."
        if analysis.study.declared_after
        else "No comparison was declared beforehand: nothing was expected, and any difference counts.",
    ]
    return " ".join(part for part in parts if part)


def comparisons_table(analysis: Analysis) -> tuple[list[str], list[list[str]]]:
    """The heads and the lines of the table of comparisons; columns that say nothing are left out."""
    results = analysis.results
    compared = max(1, analysis.tests)
    planned, after = len(analysis.study.config.seeds), analysis.study.declared_after
    columns: dict[str, Callable[[Result], str]] = {"comparison": lambda each: each.pair.name}
    for axis in dict.fromkeys(axis for each in results for axis in each.pair.cell):
        columns[axis] = lambda each, axis=axis: each.pair.cell[axis]  # type: ignore[misc]
    if len({each.metric for each in results}) > 1:
        columns["metric"] = lambda each: each.metric
    columns |= {
        "expected": expected,
        "smallest": lambda each: _or_dash(each.pair.declared.smallest or None, each),
        "verdict": _verdict,
        "difference [95 %]": difference_text,
        "p (Holm)": lambda each: p_text(each.verdict.p) if each.verdict else NOT_APPLICABLE,
        "SD for 80 %": lambda each: _or_dash(
            detectable(each.pair.declared.smallest, planned, power.ALPHA / compared), each
        ),
        "power": _power,
        "seeds": lambda each: str(len(each.seeds)),
        "to decide": lambda each: str((each.verdict and each.verdict.seeds_to_decide) or NOT_APPLICABLE),
        "declared after": lambda each: str(after.get(each.pair.name, NOT_APPLICABLE)),
    }
    cells = {head: [write(each) for each in results] for head, write in columns.items()}
    kept = {head: column for head, column in cells.items() if set(column) != {NOT_APPLICABLE}}
    return list(kept), [list(line) for line in zip(*kept.values(), strict=True)]


def expected(result: Result) -> str:
    """What was expected of a comparison; a dash for nothing."""
    return NOT_APPLICABLE if result.pair.declared.expect == "different" else result.pair.declared.expect


def _or_dash(value: float | None, result: Result) -> str:
    return NOT_APPLICABLE if value is None else number_text(value, result.measure)


def difference_text(result: Result) -> str:
    """A difference with its interval: "+1.2 [-0.3, +2.7]"."""
    if (found := result.effect) is None:
        return NOT_APPLICABLE
    value, low, high = (number_text(each, result.measure, "+") for each in (found.value, found.low, found.high))
    return f"{value} [{low}, {high}]" if math.isfinite(found.low) else f"{value} [no interval]"


def p_text(p: float) -> str:
    """A p-value with two significant digits."""
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def _verdict(result: Result) -> str:
    if result.verdict is None:
        return result.word
    if result.pair.declared.expect != "different":
        return ", ".join(filter(None, [result.word, result.verdict.shown]))
    shown = result.verdict.shown or "no difference shown"
    return f"{shown}, less than counts" if result.word == REFUTED else shown


def _power(result: Result) -> str:
    return NOT_APPLICABLE if not result.verdict or result.verdict.power is None else f"{result.verdict.power:.0%}"


def detectable(smallest: float, seeds: int, alpha: float) -> float | None:
    """The largest standard deviation of a paired difference over seeds with which so many find it with power 0.8.

    None without a smallest difference, or with one seed.
    """
    from scipy.optimize import brentq

    if not smallest or seeds < 2:
        return None

    def missing(deviation: float) -> float:
        return (power.power(smallest, power.over_seeds(deviation), seeds, alpha=alpha) or 0.0) - power.POWER

    return float(brentq(missing, smallest / 1e6, smallest * 1000, rtol=1e-6))


def forest_panels(results: Sequence[Result]) -> Iterator[Forest]:
    """A panel for each metric and each smallest difference, of the comparisons that have an interval."""
    drawn = [(each, each.effect) for each in results if each.effect and math.isfinite(each.effect.low)]
    for key in dict.fromkeys((each.metric, each.pair.declared.smallest) for each, _ in drawn):
        own = [each for each, _ in drawn if (each.metric, each.pair.declared.smallest) == key]
        (metric, smallest), measure = key, own[0].measure
        effects = [
            Effect(each.pair.title, found.value, found.low, found.high, each.outcome)
            for each in own
            if (found := each.effect)
        ]
        title = metric + (f", counts from {number_text(smallest, measure)}" if smallest else "")
        name = f"difference{', points' * measure.shares} ({direction(measure)})"
        yield Forest(title, name, effects, smallest, scale_of(measure))


def literature(analysis: Analysis) -> Iterator[Part]:
    """Whether the findings that comparisons expect by their sources were seen here."""
    lines = []
    for name, found in by_name(analysis.results):
        if not (source := found[0].pair.declared.literature):
            continue
        words = [LITERATURE.get(each.word, each.word) for each in found]
        counts = [f"{word} in {words.count(word)} of {len(words)} cells" for word in dict.fromkeys(words)]
        here = words[0] if len(words) == 1 else ", ".join(counts)
        lines.append(f"- {escaped(source)} ({escaped(name)}, expected: {expected(found[0])}): **{here}**")
    if lines:
        yield "## Literature"
        yield "\n".join(lines)
        yield (
            "Agrees: confirmed here, in sign. Disagrees: refuted. The sizes of effects are not compared, since other "
            "models and data were used."
        )

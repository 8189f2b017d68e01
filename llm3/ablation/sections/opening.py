"""The first words of an ablation's report: the question, and the verdicts on its comparisons."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from llm3.ablation.analysis import Analysis, Result, by_name
from llm3.ablation.metrics import value_text
from llm3.ablation.pairs import cells, has_one_arm
from llm3.ablation.sections.parts import Part
from llm3.ablation.verdicts import CONFIRMED, REFUTED, UNDECIDED
from llm3.errors import counted
from llm3.report.escape import escaped

MOST_IN_WORDS = 4  # comparisons in the cells of a grid, of which the one sentence says more than how many are confirmed
SHOWN = 12  # verdicts with a sentence of their own; those of more cells stand in the table
ADJUSTED = re.compile(r"; p-values adjusted for \d+ comparisons, the interval not")


def section(analysis: Analysis) -> Iterator[Part]:
    """Title, question, the verdict in one sentence, and that of each comparison with its numbers."""
    yield f"# {escaped(title(analysis))}"
    if question := analysis.study.config.question:
        yield escaped(question)
    yield f"**{escaped(headline(analysis))}**"
    number = len(analysis.results)
    if 0 < number <= SHOWN:
        yield "\n".join(f"- {escaped(line)}" for line in sentences(analysis.results))
        if number > 1:
            tests = counted(analysis.tests, "test")
            yield f"p-values are adjusted for all comparisons together ({tests}, Holm), intervals are not."


def title(analysis: Analysis) -> str:
    """The title of the page."""
    return f"Ablation {analysis.study.workdir.resolve().name}"


def headline(analysis: Analysis) -> str:
    """One sentence on all comparisons; those that show no difference are named like the others."""
    groups = list(by_name(analysis.results))
    if not groups:
        return f"Nothing is compared: there is {counted(len(analysis.study.variants), 'arm')}."
    declared = any(each.pair.declared.expect != "different" for each in analysis.results)
    if max(len(found) for _, found in groups) > 1 and not (declared and len(groups) > MOST_IN_WORDS):
        parts = []
        for metric in dict.fromkeys(each.metric for each in analysis.results):
            own = [_in_cells(*group) for group in groups if group[1][0].metric == metric]
            best = [best_point(analysis)] if has_one_arm(analysis.study) else []
            parts.append(f"in {metric}, {'; '.join(filter(None, [*best, *own]))}")
        text = "; ".join(parts)
        return f"{text[:1].upper()}{text[1:]}."
    return f"{_declared(analysis.results) if declared else _compared(analysis.results)}."


def _declared(results: Sequence[Result]) -> str:
    """How many declared comparisons are confirmed, refuted and undecided, with their names and in how many cells."""
    parts, numbers = [], Counter(each.pair.name for each in results)
    for word in (CONFIRMED, REFUTED, UNDECIDED, "not compared"):
        if names := [each.pair.name for each in results if each.word == word]:
            listed = [f"{name}{_share(names.count(name), numbers[name])}" for name in dict.fromkeys(names)]
            parts.append(f"{len(names)} {_is(len(names))} {word} ({', '.join(listed)})")
    return f"Of {counted(len(results), 'comparison')}, {joined(parts)}"


def _share(number: int, cells: int) -> str:
    return f" in {number} of {cells} cells" if number < cells else ""


def _compared(results: Sequence[Result]) -> str:
    """Which arms are better, worse, and not shown to differ; nothing was expected of them."""
    parts = []
    for each in results:
        ours, theirs = each.pair.sides
        if each.outcome:
            parts.append(f"{ours} is {'better' if each.outcome > 0 else 'worse'} than {theirs} in {each.metric}")
    for theirs in dict.fromkeys(each.pair.sides[1] for each in results):
        same = [each for each in results if each.verdict and not each.outcome and each.pair.sides[1] == theirs]
        if same:
            names = joined([each.pair.sides[0] for each in same], "or")
            parts.append(f"no difference between {theirs} and {names} is shown in {same[0].metric}")
    if lacking := [each.pair.name for each in results if each.verdict is None]:
        parts.append(f"not compared: {', '.join(lacking)}")
    text = "; ".join(parts)
    return _capitalized(text)


def _capitalized(text: str) -> str:
    """A sentence with a capital, unless it begins with the name of an arm."""
    return text[:1].upper() + text[1:] if text.startswith(("no difference", "not compared")) else text


def best_point(analysis: Analysis) -> str:
    """The point of a single arm with the best mean."""
    sign = -1 if analysis.measure.lower_is_better else 1
    means = {
        name: sum(values) / len(values)
        for name, each in cells(analysis.study)[""].items()
        if (values := list(analysis.values(each, analysis.measure.key).values()))
    }
    if not means:
        return ""
    name = max(means, key=lambda each: sign * means[each])
    return f"{name} has the best mean, {value_text(means[name], analysis.measure)}"


def _in_cells(name: str, results: Sequence[Result]) -> str:
    """In how many cells of the grid ours is better, worse, not shown to differ, and not compared."""
    texts = {1: "better", -1: "worse", 0: "not shown to differ"}
    found = [texts[each.outcome] if each.verdict else "not compared" for each in results]
    numbers = {text: found.count(text) for text in [*texts.values(), "not compared"] if text in found}
    ours, theirs = results[0].pair.ours, results[0].pair.theirs
    if ours.arm != theirs.arm:
        parts = [f"{text} in {number}" for text, number in numbers.items()]
        shown = f"{ours.arm} against {theirs.arm} is {joined(parts)} of {len(results)} cells"
        if results[0].pair.declared.expect == "different":
            return shown
        words = [each.word for each in results]
        known = [f"{word} in {words.count(word)}" for word in (CONFIRMED, REFUTED, UNDECIDED) if word in words]
        lead = "" if name == f"{ours.arm} against {theirs.arm}" else f"{name}: "
        return f"{shown} ({lead}{', '.join(known)})"
    parts = [f"{number} {_is(number)} {text}" for text, number in numbers.items()]
    return f"of {len(results)} points {name}, {joined(parts)}"


def _is(number: int) -> str:
    return "is" if number == 1 else "are"


def joined(parts: Sequence[str], word: str = "and") -> str:
    """A, B and C."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} {word} {parts[-1]}"


def sentences(results: Sequence[Result]) -> Iterator[str]:
    """The verdict on each pair, with its numbers, and the seeds that are missing."""
    for each in results:
        lacking = "".join(f" {name} lacks {seeds_text(seeds)}." for name, seeds in each.missing.items())
        if each.verdict is None:
            yield f"{each.pair.title}: not compared, since {each.reason}."
            continue
        text = ADJUSTED.sub("", each.verdict.sentence)
        if each.pair.declared.expect == "different" and each.word != REFUTED:  # nothing to confirm: the outcome alone
            text = text.partition(": ")[2]
        ours, theirs = each.pair.sides
        named = each.pair.title not in (f"{ours} against {theirs}", f"against {theirs}, {ours}")
        yield (f"{each.pair.title}: {text}" if named else _capitalized(text)) + lacking


def seeds_text(seeds: Sequence[int]) -> str:
    """The seeds in words: "seed 3", "seeds 3, 4"."""
    return f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}"

"""Beyond the deciding metric: differences in the other metrics, and what would decide what is undecided."""

from collections.abc import Iterator

from llm3.ablation import power
from llm3.ablation.analysis import Analysis, Result, Secondary
from llm3.ablation.metrics import direction, number_text, title_of
from llm3.ablation.sections.comparisons import difference_text, p_text
from llm3.ablation.sections.parts import Part, table
from llm3.ablation.verdicts import UNDECIDED
from llm3.report.escape import escaped
from llm3.report.units import NOT_APPLICABLE, count

MOST_LINES = 30  # of undecided comparisons


def other_metrics(analysis: Analysis) -> Iterator[Part]:
    """The same pairs in the metrics that do not decide."""
    if not analysis.secondary:
        return
    yield "## Other metrics"
    yield (
        "Nothing was expected of these. p is adjusted by Holm within a table. Documents: the bootstrap interval over "
        "documents, for these seeds."
    )
    for measure, found in analysis.secondary.items():
        yield f"**{escaped(title_of(measure))}**{', points' * measure.shares} ({direction(measure)})"
        documents = any(each.result.documents for each in found)
        heads = ["comparison", "difference [95 %]", *["documents"] * documents, "p (Holm)", "shown"]
        yield table(heads, [_line(each, documents) for each in found])


def _line(secondary: Secondary, documents: bool) -> list[str]:
    result, p = secondary.result, secondary.p
    line = [result.pair.title, difference_text(result)]
    if documents:
        over = result.documents
        ends = [number_text(each, result.measure, "+") for each in (over.low, over.high)] if over else []
        line.append(f"[{', '.join(ends)}]" if ends else NOT_APPLICABLE)
    if p is None or result.effect is None:
        return [*line, NOT_APPLICABLE, result.word]
    better = (result.effect.value < 0) == result.measure.lower_is_better
    return [*line, p_text(p), ("better" if better else "worse") if p <= power.ALPHA else "no difference shown"]


def what_is_needed(analysis: Analysis) -> Iterator[Part]:
    """What would decide the undecided comparisons, and what another seed costs."""
    undecided = [each for each in analysis.results if each.verdict is None or each.word == UNDECIDED]
    if not analysis.results:
        return
    yield "## What would be needed to know more"
    if not undecided:
        yield "Every comparison is decided, for this model and these data; others would say how far that holds."
        return
    yield "\n".join(f"- {escaped(f'{each.pair.title}: {_need(each)}')}" for each in undecided[:MOST_LINES])
    if len(undecided) > MOST_LINES:
        yield f"These are the first {MOST_LINES} of {len(undecided)}; the table of comparisons has all."
    total = sum(each.budget["flops"] or 0.0 for each in analysis.study.variants)
    yield (
        f"Another seed of all arms costs at most {count(total)}FLOP, less where arms share stages: add it to `seeds` "
        "and rerun the command. Looking after each seed whether a comparison is decided raises the share of "
        "false alarms."
    )


def _need(result: Result) -> str:
    if result.verdict is None:
        return f"not compared, since {result.reason}"
    if len(result.seeds) < 2:
        return "one seed cannot tell arms from seeds: at least 2, better 5"
    if (seeds := result.verdict.seeds_to_decide) is not None:
        return f"about {seeds:,} seeds ({len(result.seeds)} so far), with a power of {power.POWER:.0%}"
    return result.verdict.sentence.rpartition("). ")[2] or "not known"

"""The arms of an ablation: every seed, means with intervals, what they use, and quality against cost."""

import math
from collections.abc import Iterator, Sequence

from llm3.ablation.analysis import Analysis
from llm3.ablation.costs import EQUAL
from llm3.ablation.metrics import direction, evaluation_of, number_text, scale_of, title_of, value_text
from llm3.ablation.pairs import cells
from llm3.ablation.sections.opening import seeds_text
from llm3.ablation.sections.parts import Figure, Part, table
from llm3.ablation.statistics import interval
from llm3.ablation.study import Planned
from llm3.errors import listed
from llm3.report.entries import Measure
from llm3.report.escape import escaped
from llm3.report.matrix import majority
from llm3.report.plots.dots import DotPanel, Dots, plot_dots
from llm3.report.plots.svg import shortened
from llm3.report.plots.trade_off import Point, TradeOff, plot_trade_offs
from llm3.report.units import NOT_APPLICABLE, count, duration

MOST_DOTS = 24  # rows of the plot of all seeds; with more, the table has them
MOST_PANELS = 6  # cells with a panel of quality against cost
PARTS = {"": "new parameters and the order of the data", "init": "new parameters", "order": "the order of the data"}


def section(analysis: Analysis) -> Iterator[Part]:
    """The table of arms, what to know about them, and every seed as a point."""
    measure = analysis.measure
    unit = ", %" * measure.shares
    yield "## Arms"
    yield table(*arms_table(analysis))
    yield (
        f"{escaped(title_of(measure).capitalize())}{unit} ({direction(measure)}) of each seed, and the mean ± half of "
        f"its 95 % interval over seeds (Student's t). {varied(analysis.study.config.vary)}"
    )
    if lines := list(notes(analysis)):
        yield "\n".join(f"- {escaped(line)}" for line in lines)
    rows = dots(analysis)
    if any(row.values for row in rows) and len(rows) <= MOST_DOTS:
        panel = DotPanel(title_of(measure) + unit, rows, reference(analysis, rows))
        yield Figure("seeds", "Every seed by arm", plot_dots([panel], width=3.4))
        yield "Points are seeds; the bar is their mean with its 95 % interval."


def varied(parts: Sequence[str]) -> str:
    """What the seeds of an ablation change, and so what its intervals hold for. parts: AblationConfig.vary."""
    found: dict[str, list[str]] = {}
    for kind, _, part in (each.partition(".") for each in parts):
        found.setdefault(PARTS[part], []).append(kind)
    if not found:
        return "The seed changes nothing: intervals over seeds say nothing."
    what = " and ".join(f"{part} in {listed(kinds)}" for part, kinds in found.items())
    return f"The seed changes {what}: intervals over seeds hold for this alone."


def arms_table(analysis: Analysis) -> tuple[list[str], list[list[str]]]:
    """The heads and the lines of the table of arms."""
    study, measure = analysis.study, analysis.measure
    timed = any(each.budget["seconds"] is not None for each in study.variants)
    matched = any(each.excess is not None for each in study.variants)
    adjusted = any(each.adjusted for each in study.variants)
    heads = ["arm", "each seed", "mean", "stages", "tokens", "FLOPs"]
    heads += ["time of steps"] * timed + [f"{study.config.match} against {study.reference}"] * matched
    heads += ["adjusted steps"] * adjusted
    lines = []
    for each in study.variants:
        values = analysis.values(each, measure.key)
        line = [each.name, _each_seed(values, study.config.seeds, measure), mean_text(list(values.values()), measure)]
        line += [" > ".join(each.stages), count(each.budget["tokens"]), count(each.budget["flops"])]
        line += [duration(each.budget["seconds"])] * timed
        line += [NOT_APPLICABLE if each.excess is None else f"{100 * each.excess:+.1f} %"] * matched
        line += ["{}: {:,} to {:,}".format(*each.adjusted) if each.adjusted else NOT_APPLICABLE] * adjusted
        lines.append(line)
    return heads, lines


def _each_seed(values: dict[int, float], seeds: Sequence[int], measure: Measure) -> str:
    """The value of every seed in order; a dash for those that are not finished, or have the stage runs of another."""
    if not values:
        return "no finished seed"
    return ", ".join(number_text(values[seed], measure) if seed in values else NOT_APPLICABLE for seed in seeds)


def mean_text(values: Sequence[float], measure: Measure) -> str:
    """The mean with half of its 95 % interval over seeds, if they give one."""
    if not values:
        return NOT_APPLICABLE
    found = interval(values)
    if not math.isfinite(found.low):
        return value_text(found.value, measure)
    half = number_text(found.high - found.value, measure)
    return f"{number_text(found.value, measure)} ± {half}" + " %" * measure.shares


def notes(analysis: Analysis) -> Iterator[str]:
    """What to know about the arms: notes of the config, budgets that are not equal, adjusted steps, missing seeds."""
    study, match = analysis.study, analysis.study.config.match
    yield from (f"{name}: {arm.note}" for name, arm in study.config.arms.items() if arm.note)
    if (share := chance(analysis)) is not None:
        yield f"The most frequent class has {share:.1f} %"
    over = {each.name: each.excess for each in study.variants if each.excess is not None and abs(each.excess) > EQUAL}
    if over:
        names = ", ".join(f"{name} ({100 * excess:+.0f} %)" for name, excess in over.items())
        yield f"Not equal in {match} to {study.reference}, by more than {100 * EQUAL:g} %: {names}"
    for each in study.variants:
        if each.adjusted:
            stage, before, now = each.adjusted
            yield f"{each.name}: {stage} trains {now:,} steps instead of {before:,}, to match {match}"
        done = [outcome.seed for outcome in study.of(each.name)]
        if lacking := [seed for seed in study.config.seeds if seed not in done]:
            yield f"{each.name}: not finished with {seeds_text(lacking)}"
        number = len(analysis.values(each, study.config.metric))
        if 0 < number < len(done):
            yield f"{each.name}: some seeds have the same stage runs, so only {number} of {len(done)} count"


def dots(analysis: Analysis) -> list[Dots]:
    """A row of points for each variant."""
    scale, rows = scale_of(analysis.measure), []
    for each in analysis.study.variants:
        values = [scale * value for value in analysis.values(each, analysis.measure.key).values()]
        found = interval(values) if values else None
        mean = (found.value, found.high - found.value) if found and math.isfinite(found.low) else None
        rows.append(Dots(each.name, values, mean))
    return rows


def chance(analysis: Analysis) -> float | None:
    """The accuracy of the most frequent class, in percent, if it is the same for all arms."""
    if analysis.measure.name != "accuracy":
        return None
    shares = {majority(row, evaluation_of(analysis.measure)) for row in analysis.rows}
    share = shares.pop() if len(shares) == 1 else None
    return None if share is None else 100 * share


def reference(analysis: Analysis, rows: Sequence[Dots]) -> tuple[float, str] | None:
    """The line of the most frequent class, unless it is so far away that it would hide how seeds differ."""
    values, share = [value for row in rows for value in row.values], chance(analysis)
    if share is None or min(values) - share > max(values) - min(values):
        return None
    return share, "most frequent class"


def trade_off(analysis: Analysis) -> Iterator[Part]:
    """Quality against cost, a panel for each cell."""
    measure = analysis.measure
    panels = []
    axes: list[str] = []
    for cell, variants in cells(analysis.study).items():
        points = [point for name, each in variants.items() if (point := _point(analysis, name, each))]
        if len({point.cost for point in points}) > 1:
            place = next(iter(variants.values())).cell if cell else {}
            axes = list(place)
            title = shortened(", ".join(place.values()), 20) or title_of(measure) + ", %" * measure.shares
            panels.append(TradeOff(title, "FLOPs of all stages", points, measure.lower_is_better, measure.shares))
    if not panels:
        return
    yield "## Quality against cost"
    title = "Quality against training FLOPs, with the Pareto front of the arms"
    yield Figure("cost", title, plot_trade_offs(panels[:MOST_PANELS]))
    yield (
        f"Mean {escaped(title_of(measure))} over seeds. On the Pareto front (filled) no arm is both cheaper and "
        "better. Differences between neighbours may be chance: see the comparisons."
        + (f" A panel is a cell of the grid: {escaped(', '.join(axes))}." if axes else "")
    )
    if len(panels) > MOST_PANELS:
        yield f"These are the first {MOST_PANELS} of {len(panels)} cells."


def _point(analysis: Analysis, name: str, variant: Planned) -> Point | None:
    values = list(analysis.values(variant, analysis.measure.key).values())
    cost = variant.budget["flops"]
    return Point(name, cost, sum(values) / len(values)) if values and cost else None

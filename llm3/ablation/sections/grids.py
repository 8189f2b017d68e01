"""What a grid shows: maps of the differences with the line where the verdict turns, or lines over its one axis."""

from collections.abc import Iterator, Sequence
from itertools import product

from llm3.ablation.analysis import Analysis, Result, by_name
from llm3.ablation.metrics import direction, number_text, scale_of, title_of
from llm3.ablation.sections.opening import joined
from llm3.ablation.sections.parts import Figure, Part
from llm3.ablation.statistics import interval
from llm3.ablation.verdicts import REFUTED
from llm3.report.escape import escaped
from llm3.report.plots.intervals import Band, BandPanel, BandPoint, plot_bands
from llm3.report.plots.verdict_map import VerdictCell, VerdictPanel, plot_verdict_maps

MOST_PANELS = 12
SIGNS = (
    "▲ better, ▼ worse: shown beyond chance, adjusted for all cells and comparisons together. ✗: shown not to be what "
    "was expected, though not which is better. Without a sign nothing is shown. The black line is where the verdict "
    "turns. Grey: not compared."
)


def section(analysis: Analysis) -> Iterator[Part]:
    """The figures of a grid; nothing without one."""
    axes = axes_of(analysis)
    if not axes or not analysis.rows:
        return
    yield f"## Over {escaped(joined(list(axes)))}"
    yield from _lines(analysis, *axes) if len(axes) == 1 else _maps(analysis, axes)


def axes_of(analysis: Analysis) -> dict[str, list[str]]:
    """{axis of the grid: its values}, those with at least two values."""
    found: dict[str, list[str]] = {}
    for each in analysis.study.variants:
        for axis, value in each.cell.items():
            if value not in found.setdefault(axis, []):
                found[axis].append(value)
    return {axis: values for axis, values in found.items() if len(values) > 1}


def _lines(analysis: Analysis, axis: str) -> Iterator[Part]:
    places, measure = axes_of(analysis)[axis], analysis.measure
    means = _means(analysis, axis, places)
    panels = [BandPanel(title_of(measure), axis, measure.title + ", %" * measure.shares, places, means)]
    for metric, results in _by_metric(analysis):
        bands = [Band(name, _differences(found, axis, places)) for name, found in by_name(results)]
        title, unit = f"{metric} ({direction(results[0].measure)})", ", points" * results[0].measure.shares
        panels.append(BandPanel(title, axis, f"difference{unit}", places, bands, zero=True))
    yield Figure("grid", f"Means and differences over {axis}", plot_bands(panels))
    yield (
        f"First: means over seeds with 95 % intervals ({direction(measure)}). Then: differences with their 95 % "
        "intervals; filled where they are shown beyond chance, adjusted for all comparisons together."
    )


def _means(analysis: Analysis, axis: str, places: Sequence[str]) -> list[Band]:
    measure = analysis.measure
    bands: dict[str, list[BandPoint]] = {}
    for each in analysis.study.variants:
        if values := [scale_of(measure) * value for value in analysis.values(each, measure.key).values()]:
            place = places.index(each.cell[axis])
            bands.setdefault(each.arm, []).append(BandPoint(place, *interval(values)))
    return [Band(arm, found) for arm, found in bands.items()]


def _differences(results: Sequence[Result], axis: str, places: Sequence[str]) -> list[BandPoint]:
    points = []
    for each in results:
        if each.effect is not None:
            value, low, high = (scale_of(each.measure) * end for end in each.effect[:3])
            points.append(BandPoint(places.index(each.pair.cell[axis]), value, low, high, each.outcome != 0))
    return points


def _maps(analysis: Analysis, axes: dict[str, list[str]]) -> Iterator[Part]:
    """A panel for each comparison and each value of the axes beyond two."""
    down, across, *_ = axes
    for number, (metric, results) in enumerate(_by_metric(analysis)):
        panels, measure = _map_panels(results, axes), results[0].measure
        shown = plot_verdict_maps(panels[:MOST_PANELS], (down, axes[down]), (across, axes[across]))
        name = f"map_{number}" if number else "map"
        yield Figure(name, f"Differences in {metric} over {down} and {across}", shown)
        yield (
            f"Each cell: the mean difference in {escaped(metric)}{', points' * measure.shares} ({direction(measure)}), "
            "paired by seed; blue: better, red: worse."
        )
        if len(panels) > MOST_PANELS:
            yield f"These are the first {MOST_PANELS} of {len(panels)} maps; the table of comparisons has all cells."
    yield SIGNS


def _by_metric(analysis: Analysis) -> Iterator[tuple[str, list[Result]]]:
    for metric in dict.fromkeys(each.metric for each in analysis.results):
        yield metric, [each for each in analysis.results if each.metric == metric]


def _map_panels(results: Sequence[Result], axes: dict[str, list[str]]) -> list[VerdictPanel]:
    down, across, *others = axes
    panels = []
    for name, found in by_name(results):
        for rest in product(*(axes[each] for each in others)):
            fixed = dict(zip(others, rest, strict=True))
            own = [each for each in found if all(each.pair.cell[axis] == value for axis, value in fixed.items())]
            cells = {(each.pair.cell[down], each.pair.cell[across]): _cell(each) for each in own}
            grid = [[cells.get((row, column)) for column in axes[across]] for row in axes[down]]
            panels.append(VerdictPanel(", ".join([name, *(f"{axis}={fixed[axis]}" for axis in others)]), grid))
    return panels


def _cell(result: Result) -> VerdictCell | None:
    if result.effect is None:
        return None
    ahead = -result.effect.value if result.measure.lower_is_better else result.effect.value
    sign = {1: " ▲", -1: " ▼", 0: " ✗" if result.word == REFUTED else ""}[result.outcome]
    verdict = f"{result.word} {result.outcome}"
    return VerdictCell(ahead, number_text(result.effect.value, result.measure, "+") + sign, verdict)

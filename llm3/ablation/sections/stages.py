"""The stages behind the arms: results, forgetting, curves, calibration, samples and lineage, in two cells of a grid."""

from collections.abc import Iterator, Mapping

from llm3.ablation.analysis import Analysis
from llm3.ablation.materials import material
from llm3.ablation.metrics import evaluation_of, measures_of
from llm3.ablation.pairs import cells
from llm3.ablation.sections.curves import Curves
from llm3.ablation.sections.parts import Figure, Part, table
from llm3.ablation.study import Planned
from llm3.report import forgetting
from llm3.report import table as matrix_table
from llm3.report.escape import escaped
from llm3.report.examples import samples_section
from llm3.report.figures import lineage, matrix_map, reliabilities
from llm3.report.material import Material
from llm3.report.matrix import metrics_of
from llm3.report.plots.classification import plot_reliability
from llm3.report.plots.curves import plot_curves
from llm3.report.plots.dots import plot_dots
from llm3.report.plots.lineage import plot_lineage
from llm3.report.replicates import estimate
from llm3.report.statistics import calibration_error
from llm3.report.units import NOT_APPLICABLE, words

MOST_ARMS = 12  # in curves and graphs
MOST_METRICS = 3  # in curves


def section(analysis: Analysis) -> Iterator[Part]:
    """All sections of the first and of the last cell of the grid."""
    every = cells(analysis.study)
    ends = dict.fromkeys([next(iter(every)), next(reversed(every))])
    for number, cell in enumerate(ends):
        arms = dict(list(every[cell].items())[:MOST_ARMS])
        found = material(analysis.study, arms)
        if not found.given_rows:
            continue
        place = f"at {cell}" if cell else ""
        suffix = f"_{number}" if len(ends) > 1 else ""
        if place:
            yield f"## Stages {escaped(place)}"
        yield _head("Stages, evaluations and resources", place)
        yield from _matrix(found, place, suffix)
        if notes := list(_left_out(len(every), len(every[cell]), len(arms))):
            yield " ".join(notes)
        yield from _forgetting(found, place, suffix)
        yield from _curves(analysis, arms, place, suffix)
        yield from _calibration(analysis, found, place, suffix)
        yield from _samples(material(analysis.study, arms, one_seed=True), place)
        yield from _lineage(found, place, suffix)


def _head(name: str, place: str) -> str:
    """The head of a section; those of a cell stand below the head of the cell."""
    return f"### {name}" if place else f"## {name}"


def _left_out(number_of_cells: int, arms: int, shown: int) -> Iterator[str]:
    if number_of_cells > 2:
        yield f"These sections show the first and the last of {number_of_cells} cells; `runs` has all stage runs."
    if arms > shown:
        yield f"They show the first {shown} of {arms} arms."


def _matrix(found: Material, place: str, suffix: str) -> Iterator[Part]:
    heads, lines, _ = matrix_table.grid(found.shown, [])
    yield table([head.replace("\n", " ").strip() for head in heads], lines)
    yield (
        "A stage that arms share is there once; ARM: STAGE xN is the mean over N seeds. In brackets, the change since "
        "the parent. Tokens, FLOPs, time and memory are those of the training steps of this stage alone."
    )
    if columns := metrics_of(found.stages):
        yield Figure(f"matrix{suffix}", f"Metrics by stage {place}".strip(), matrix_map(found, columns))
        yield "The darker a cell, the better the stage is among the stages of its column."


def _forgetting(found: Material, place: str, suffix: str) -> Iterator[Part]:
    if not (panels := forgetting.forgetting_panels(found)):
        return
    yield _head("Forgetting", place)
    heads = ["stage", *(panel.x_name for panel in panels)]
    stages = zip(*(panel.rows for panel in panels), strict=True)
    yield table(heads, [[rows[0].label, *(_lost(row.values) for row in rows)] for rows in stages])
    yield forgetting.LEGEND
    yield Figure(
        f"forgetting{suffix}", f"Bits per byte lost since the best ancestor {place}".strip(), plot_dots(panels)
    )


def _lost(values: list[float]) -> str:
    if not values:
        return NOT_APPLICABLE
    over = estimate(values)
    return f"{sum(values) / len(values):+.3f}" + (f" ± {over.half_width:.3f}" if over else "")


def _curves(analysis: Analysis, arms: Mapping[str, Planned], place: str, suffix: str) -> Iterator[Part]:
    texts = [each for each in measures_of(analysis.rows) if each.name == "bits_per_byte" and each != analysis.measure]
    panels = Curves(analysis.study, arms).panels([analysis.measure, *texts][:MOST_METRICS])
    if not panels:
        return
    yield _head("Training", place)
    yield Figure(f"progress{suffix}", f"Loss and metrics over all stages {place}".strip(), plot_curves(panels))
    yield (
        "Each stage begins where its parent ends; dotted lines mark the hand-offs. Each seed is a thin line and their "
        "mean a thick one. A stage that arms share has the look of the first of them. The loss is smoothed."
    )


def _calibration(analysis: Analysis, found: Material, place: str, suffix: str) -> Iterator[Part]:
    evaluation = evaluation_of(analysis.measure)
    if not any(metric.evaluation == evaluation for metric in metrics_of(found.stages)):
        return
    bins = reliabilities(found, evaluation)
    arms = {label: label.rpartition(": ")[0] for label in bins}
    if len(set(arms.values())) == len(arms):
        bins = {arms[label]: each for label, each in bins.items()}
    if bins:
        errors = {label: calibration_error(each) for label, each in bins.items()}
        yield _head("Calibration", place)
        yield Figure(f"calibration{suffix}", f"Accuracy by confidence {place}".strip(), plot_reliability(bins, errors))
        yield (
            f"{escaped(words(evaluation).capitalize())}: the share of right answers by the confidence in the predicted "
            "class, all seeds together. Below the dashed line an arm is overconfident. ECE: expected calibration error."
        )


def _samples(found: Material, place: str) -> Iterator[Part]:
    if parts := samples_section(found):
        yield _head("Samples", place)
        yield "The same prompts after every stage, with the first seed."
        yield from parts[1:]


def _lineage(found: Material, place: str, suffix: str) -> Iterator[Part]:
    if any(row.get("parent") for row in found.stages):
        yield _head("Lineage", place)
        yield Figure(f"lineage{suffix}", f"Stages that arms share {place}".strip(), plot_lineage(lineage(found)))
        yield "An arrow leads from a stage to those that start from its model; xN: one for each of N seeds."

"""The report page of a run: a verdict, then the gain, the cost and the details of each stage, from its rows."""

from collections.abc import Callable, Iterator
from pathlib import Path

from llm3.files import MATRIX
from llm3.report import comparisons, cost, examples, forgetting, seeds, settings, time_spent, verdict
from llm3.report.details import in_detail, repeated
from llm3.report.escape import block, escaped, marked_block
from llm3.report.figures import figures, image, task_section
from llm3.report.html import write_page
from llm3.report.material import Material
from llm3.report.matrix import Metric, comparable, metrics_of, write_matrix
from llm3.report.replicates import unreplicated
from llm3.report.table import (
    ERRORS_NOTE,
    METRIC_NAMES,
    OTHER_DATA_NOTE,
    PERCENTAGES,
    REPLICATES_NOTE,
    any_errors,
    any_on_other_data,
    markdown,
    markdown_table,
    trained,
)
from llm3.report.units import count, duration, gibibytes, percent, words

LEGEND = (
    "Bits per byte: lower is better; in brackets, the change since the parent of the stage. Rows in italics are "
    "baselines, outside the chain of stages. Tokens, FLOPs and time cover the training steps only, without "
    "compilation, saving and evaluation. Peak memory is the peak of the process while the stage trained; on an "
    "accelerator, the peak of a device since the process started."
)


def write_report(directory: Path | str, material: Material) -> None:
    """Write the report as Markdown and as HTML, with its figures, and DIR/matrix.json.

    Raises ValueError for a metric that is not finite, OSError if the disk refuses.
    """
    directory = Path(directory)
    text = page(material)
    write_page(directory, material.title, text, {name: draw() for name, draw in figures(material).items()})
    # last, since it marks the report as complete
    write_matrix(directory / MATRIX, material.given_rows, material.given_baselines)


def page(material: Material) -> str:
    """The text of report.md."""
    return "\n\n".join(part for section in SECTIONS for part in section(material)) + "\n"


def title_section(material: Material) -> list[str]:
    """The title."""
    return [f"# {escaped(material.title)}"]


def matrix_section(material: Material) -> list[str]:
    """The table of all stages, and its heat map."""
    shown, baselines = material.shown, material.shown_baselines
    parts = [markdown(shown, baselines), LEGEND]
    if any_errors([*shown, *baselines]):
        parts.append(f"{ERRORS_NOTE}.")
    if any_on_other_data([*shown, *baselines]):
        parts.append(f"{OTHER_DATA_NOTE}.")
    if len(shown) + len(baselines) < len(material.stages):
        parts.append(f"{REPLICATES_NOTE}; matrix.json has the row of every seed.")
    plot = image(material, "matrix.svg", "Heat map of the metrics by stage")
    note = "The darker a cell, the better the stage is among the trained stages of its column."
    return ["## Stages and evaluations", *parts, *plot, *([note] if plot else [])]


def cost_section(material: Material) -> list[str]:
    """Quality against cost."""
    plot = image(material, "cost.svg", "Quality against training FLOPs, with the Pareto front")
    note = (
        "FLOPs are those of a stage with all its ancestors. On the Pareto front (filled) no stage is both cheaper and "
        "better. Differences between stages may be chance: see the tests above."
    )
    return ["## Quality against cost", *plot, note] if plot else []


def forgetting_section(material: Material) -> list[str]:
    """What each stage lost of its ancestors' fit to each text."""
    found = forgetting.section(material)
    return [*found, *image(material, "forgetting.svg", "Bits per byte lost since the best ancestor")] if found else []


def stages_section(material: Material) -> list[str]:
    """What each stage gained, lost and cost."""
    parts = ["## Gain and cost of each stage"]
    for row in material.single:
        if (parent := material.parent(row)) is not None:
            sentences = stage_sentences(metrics_of(material.rows), parent, row)
            parts += [f"**{row['stage']}**, from {parent['stage']}:", "\n".join(f"- {line}" for line in sentences)]
    return parts if len(parts) > 1 else []


def comparisons_section(material: Material) -> list[str]:
    """The tests of all stages, and their intervals as a forest plot."""
    return comparisons.section(material, lambda name: image(material, f"intervals_{name}.svg", "Intervals"))


def seeds_section(material: Material) -> list[str]:
    """Means over seeds, and the plot of all seeds."""
    found = seeds.section(material)
    return [*found, *image(material, "seeds.svg", "Every seed by recipe")] if found else []


def step_section(material: Material) -> list[str]:
    """The cost of a step."""
    heads, lines = cost.savings([*material.shown, *material.shown_baselines])
    return ["## Cost of a step", markdown_table(heads, lines), cost.LEGEND] if lines else []


def details_section(material: Material) -> list[str]:
    """Results beyond single numbers, and epochs."""
    single = [*material.single, *unreplicated(material.baselines)]
    return [*in_detail(material.rows, material.details), *repeated(single)]


def training_section(material: Material) -> list[str]:
    """The curves over all stages."""
    plots = image(material, "progress.svg", "Loss and evaluations over all stages, by tokens and by FLOPs")
    note = (
        "Each stage begins where its parent ends; dotted lines mark the hand-offs. The loss is smoothed. Where stages "
        "differ in their seed only, each seed is a thin line and their mean a thick one. The evaluations of "
        "baselines are dotted, with hollow points."
    )
    return ["## Training", *plots, note] if plots else []


def data_section(material: Material) -> list[str]:
    """The first windows of each stage, with the tokens that carry loss."""
    parts = []
    for stage, lines in material.data_samples.items():
        parts += [f"**{stage}**", marked_block([[(text, bool(mark)) for text, mark in line] for line in lines])]
    note = "The first windows that each stage trains on, shortened. The targets of the loss are marked."
    return ["## Training data", note, *parts] if parts else []


def lineage_section(material: Material) -> list[str]:
    """Which model each stage began with, and how a stage was changed while it trained."""
    plot = image(material, "lineage.svg", "Lineage of the models")
    note = "An arrow leads from a model to the stage that began with its parameters; digests are of the parameters."
    amended = [
        f"- {escaped(row['stage'])}: {escaped(line)}" for row in material.stages for line in row.get("amendments") or ()
    ]
    drawn = [*plot, f"{note} Baselines have dashed boxes."] if plot else []
    return ["## Lineage", *drawn, *["\n".join(amended)] * bool(amended)] if drawn or amended else []


def reproduce_section(material: Material) -> list[str]:
    """The command, and where it ran."""
    facts = "\n".join(f"- {name}: {escaped(str(value))}" for name, value in material.facts.items())
    return ["## How to reproduce it", block(material.command, "bash"), *([facts] if facts else [])]


Section = Callable[[Material], list[str]]
SECTIONS: tuple[Section, ...] = (
    title_section,
    verdict.section,
    matrix_section,
    stages_section,
    comparisons_section,
    seeds_section,
    forgetting_section,
    cost_section,
    training_section,
    task_section,
    examples.errors_section,
    examples.samples_section,
    data_section,
    lineage_section,
    step_section,
    time_spent.resources_section,
    time_spent.chain_section,
    details_section,
    reproduce_section,
    settings.section,
)


def stage_sentences(columns: list[Metric], parent: dict, row: dict) -> Iterator[str]:
    """One sentence for each metric that `row` changed since `parent`, then forgetting, then cost. Rows are complete."""
    both = [metric for metric in columns if parent[metric.key] is not None and row[metric.key] is not None]
    shared = [metric for metric in both if comparable(row, parent, metric.evaluation)]
    for metric in shared:
        yield f"{words(metric.evaluation).capitalize()}: {change(metric, parent[metric.key], row[metric.key])}."
    for evaluation in dict.fromkeys(metric.evaluation for metric in both if metric not in shared):
        yield f"{words(evaluation).capitalize()}: measured on other data than {parent['stage']}, so not compared."
    language = [metric for metric in shared if metric.name == "bits_per_byte"]
    if language and parent["tokens"]:  # an untrained parent has nothing to forget
        lost = [
            f"{words(metric.evaluation)} text costs {row[metric.key] - parent[metric.key]:.3f} bits a byte more"
            for metric in language
            if row[metric.key] > parent[metric.key]
        ]
        yield (
            f"Forgetting: {' and '.join(lost)} than after {parent['stage']}."
            if lost
            else (f"Forgetting: none; no text costs more bits than after {parent['stage']}.")
        )
    costs = [
        (row["tokens"], f"{count(row['tokens'])} tokens"),
        (row["flops"], f"{count(row['flops'])} FLOPs"),
        (row["seconds"], duration(row["seconds"])),
        (row["peak_bytes"], f"{gibibytes(row['peak_bytes'])} GiB at the peak"),
        (row["trainable_params"], f"{trained(row)} parameters trained"),
    ]
    if known := [text for value, text in costs if value is not None]:
        yield f"Cost: {', '.join(known)}."
    if ended := row.get("early_stopping"):
        yield f"The result is step {ended['result_step']} of {ended['stopped_at']}: {ended['why']}."


def change(metric: Metric, before: float, after: float) -> str:
    """One metric before and after, and its change: relative for bits per byte, in points for percentages."""
    if metric.name in PERCENTAGES:
        name = METRIC_NAMES.get(metric.name, words(metric.name))
        return f"{name} {percent(before)} → {percent(after)} ({100 * (after - before):+.1f} points)"
    name = "bits per byte" if metric.name == "bits_per_byte" else words(metric.name)
    relative = f" ({100 * (after - before) / before:+.1f} %)" if before else ""
    return f"{before:.3f} → {after:.3f} {name}{relative}"

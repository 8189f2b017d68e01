"""The report page of a run: a verdict, then the gain, the cost and the details of each stage, from its rows."""

from collections.abc import Callable, Iterator
from pathlib import Path

from llm3.files import MATRIX, REPORT, write_atomic
from llm3.report import comparisons, cost, examples, seeds, settings, time_spent, verdict
from llm3.report.details import in_detail, repeated
from llm3.report.figures import figures, image, task_section
from llm3.report.material import Material
from llm3.report.matrix import Metric, metrics_of, write_matrix
from llm3.report.replicates import unreplicated
from llm3.report.table import (
    ERRORS_NOTE,
    METRIC_NAMES,
    PERCENTAGES,
    REPLICATES_NOTE,
    any_errors,
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
    """Write DIR/report.md with its plots, and DIR/matrix.json. Raises ValueError for a metric that is not finite."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name, draw in figures(material).items():
        draw(directory / name)
    write_atomic(directory / REPORT, page(material))
    # last, since it marks the report as complete
    write_matrix(directory / MATRIX, material.given_rows, material.given_baselines)


def page(material: Material) -> str:
    """The text of report.md."""
    return "\n\n".join(part for section in SECTIONS for part in section(material)) + "\n"


def title_section(material: Material) -> list[str]:
    """The title."""
    return [f"# {material.title}"]


def matrix_section(material: Material) -> list[str]:
    """The table of all stages, and its plot."""
    shown, baselines = material.shown, material.shown_baselines
    parts = [markdown(shown, baselines), LEGEND]
    if any_errors([*shown, *baselines]):
        parts.append(f"{ERRORS_NOTE}.")
    if len(shown) + len(baselines) < len(material.stages):
        parts.append(f"{REPLICATES_NOTE}; matrix.json has the row of every seed.")
    plot = image(material, "matrix.png", "Metrics by stage")
    note = "Error bars: 95 % intervals, over the items of an evaluation or, of a mean, over its seeds."
    return [*parts, *plot, *([note] if plot else [])]


def stages_section(material: Material) -> list[str]:
    """What each stage gained, lost and cost."""
    parts = ["## Gain and cost of each stage"]
    for row in material.single:
        if (parent := material.parent(row)) is not None:
            sentences = stage_sentences(metrics_of(material.rows), parent, row)
            parts += [f"**{row['stage']}**, from {parent['stage']}:", "\n".join(f"- {line}" for line in sentences)]
    return parts if len(parts) > 1 else []


def seeds_section(material: Material) -> list[str]:
    """Means over seeds, and the plot of all seeds."""
    found = seeds.section(material)
    return [*found, *image(material, "seeds.png", "Every seed by recipe")] if found else []


def step_section(material: Material) -> list[str]:
    """The cost of a step."""
    heads, lines = cost.savings([*material.shown, *material.shown_baselines])
    return ["## Cost of a step", markdown_table(heads, lines), cost.LEGEND] if lines else []


def details_section(material: Material) -> list[str]:
    """Results beyond single numbers, and epochs."""
    single = [*material.single, *unreplicated(material.baselines)]
    return [*in_detail(material.rows, material.details), *repeated(single)]


def training_section(material: Material) -> list[str]:
    """The curves."""
    plots = image(material, "loss.png", "Loss by step")
    return ["## Training", *plots] if plots else []


def reproduce_section(material: Material) -> list[str]:
    """The command, and where it ran."""
    facts = "\n".join(f"- {name}: {value}" for name, value in material.facts.items())
    return ["## How to reproduce it", f"```bash\n{material.command}\n```", *([facts] if facts else [])]


Section = Callable[[Material], list[str]]
SECTIONS: tuple[Section, ...] = (
    title_section,
    verdict.section,
    matrix_section,
    stages_section,
    comparisons.section,
    seeds_section,
    task_section,
    examples.errors_section,
    examples.samples_section,
    step_section,
    time_spent.wall_section,
    time_spent.chain_section,
    details_section,
    training_section,
    reproduce_section,
    settings.section,
)


def stage_sentences(columns: list[Metric], parent: dict, row: dict) -> Iterator[str]:
    """One sentence for each metric that `row` changed since `parent`, then forgetting, then cost. Rows are complete."""
    shared = [metric for metric in columns if parent[metric.key] is not None and row[metric.key] is not None]
    for metric in shared:
        yield f"{words(metric.evaluation).capitalize()}: {change(metric, parent[metric.key], row[metric.key])}."
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

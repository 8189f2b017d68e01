"""The report page of a run: the gain and cost of each stage, in sentences computed from the rows."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from llm3.files import MATRIX, REPORT, write_atomic
from llm3.report import cost, seeds
from llm3.report.details import in_detail, repeated
from llm3.report.matrix import Metric, complete, majority, metrics_of, parent_of, standard_error, write_matrix
from llm3.report.plots import plot_losses, plot_matrix, plot_seeds
from llm3.report.replicates import Recipe, collapsed, recipes, unreplicated
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


def write_report(
    directory: Path | str,
    rows: list[dict],
    baselines: list[dict],
    histories: dict[str, list[dict]],
    *,
    title: str,
    command: str,
    facts: dict,
    details: Mapping[str, dict | None] | None = None,
) -> None:
    """Write DIR/report.md with DIR/matrix.json, DIR/matrix.png and DIR/loss.png; with replicates, DIR/seeds.png.

    rows, baselines: as in `llm3.report.matrix`. histories: as in `plot_losses`. command: the command of the run. facts:
    {name: value} to list, e.g. device, versions and seed. details: {stage: evaluation results beyond single numbers};
    the page shows those of the last stage. Raises ValueError for a metric that is not finite.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    full_rows, full_baselines = complete(rows, baselines)
    plot_matrix(directory / "matrix.png", collapsed(full_rows), collapsed(full_baselines))
    found = recipes([*full_rows, *full_baselines])
    plot_losses(directory / "loss.png", merged(histories, found))
    if found:
        plot_seeds(directory / "seeds.png", found)
    text = page(rows, baselines, title=title, command=command, facts=facts, details=details)
    write_atomic(directory / REPORT, text)
    write_matrix(directory / MATRIX, rows, baselines)  # last, since it marks the report as complete


def page(
    rows: list[dict],
    baselines: list[dict],
    *,
    title: str,
    command: str,
    facts: dict,
    details: Mapping[str, dict | None] | None = None,
) -> str:
    """The text of report.md."""
    rows, baselines = complete(rows, baselines)
    shown, shown_baselines = collapsed(rows), collapsed(baselines)
    single = unreplicated(rows)
    parts = [f"# {title}", markdown(shown, shown_baselines), LEGEND]
    if any_errors([*shown, *shown_baselines]):
        parts.append(f"{ERRORS_NOTE}.")
    if len(single) < len(rows):
        parts.append(f"{REPLICATES_NOTE}; matrix.json has the row of every seed.")
    parts += ["![Metrics by stage](matrix.png)", "## Gain and cost of each stage"]
    for row in single:
        if (parent := parent_of(rows, row)) is not None:
            sentences = stage_sentences(metrics_of(rows), parent, row)
            parts += [f"**{row['stage']}**, from {parent['stage']}:", "\n".join(f"- {line}" for line in sentences)]
    if tasks := [f"- {line}" for line in task_sentences(single, unreplicated(baselines))]:
        parts += ["## The tasks", "\n".join(tasks)]
    if compared := seeds.section([*rows, *baselines]):
        parts += [*compared, "![Accuracy by trained parameters](seeds.png)"]
    heads, lines = cost.savings([*shown, *shown_baselines])
    if lines:
        parts += ["## Cost of a step", markdown_table(heads, lines), cost.LEGEND]
    parts += in_detail(rows, details or {})
    parts += repeated([*single, *unreplicated(baselines)])
    parts += ["## Training", "![Loss by step](loss.png)"]
    parts += ["## How to reproduce it", f"```bash\n{command}\n```"]
    if facts:
        parts.append("\n".join(f"- {name}: {value}" for name, value in facts.items()))
    return "\n\n".join(parts) + "\n"


def merged(histories: dict[str, list[dict]], found: list[Recipe]) -> dict[str, list[dict]]:
    """The histories, with those of each recipe merged into one, sorted by step."""
    names = {row["stage"]: recipe.label for recipe in found for row in recipe.rows}
    joined: dict[str, list[dict]] = {}
    for stage, lines in histories.items():
        joined.setdefault(names.get(stage, stage), []).extend(lines)
    return {name: sorted(lines, key=lambda line: line["step"]) for name, lines in joined.items()}


LEGEND = (
    "Bits per byte: lower is better; in brackets, the change since the parent of the stage. Rows in italics are "
    "baselines, outside the chain of stages. Tokens, FLOPs and time cover the training steps only, without "
    "compilation, saving and evaluation. Peak memory is the peak of the process while the stage trained; on an "
    "accelerator, the peak of a device since the process started."
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


def task_sentences(rows: list[dict], baselines: list[dict]) -> Iterator[str]:
    """The last accuracy of each task compared with the majority class and each baseline. Rows are complete."""
    for metric in metrics_of([*rows, *baselines]):
        scored = [row for row in rows if row[metric.key] is not None]
        if metric.name not in ("accuracy", "acc") or not scored:
            continue
        last, name = scored[-1], words(metric.evaluation)
        text = f"**{name}**: {accuracy(last, metric)} after {last['stage']}"
        if metric.name == "accuracy" and (chance := majority(last, metric.evaluation)) is not None:
            text += f", against {percent(chance)} for the majority class"
        yield f"{text}."
        for row in baselines:
            if row[metric.key] is not None:
                yield f"**{name}**, {last['stage']} against {row['stage']}: {versus(last, row, metric)}"


def accuracy(row: dict, metric: Metric) -> str:
    """An accuracy with its standard error, if the number of items is known."""
    error = standard_error(row, metric)
    if error is None:
        return percent(row[metric.key])
    items = row[f"{metric.evaluation}_items"]
    return f"{percent(row[metric.key])} (standard error {100 * error:.1f} points, {items} items)"


def versus(row: dict, other: dict, metric: Metric) -> str:
    """The difference between `row` and the baseline `other`, and whether it is significant for this many items."""
    difference = row[metric.key] - other[metric.key]
    text = (
        f"{percent(row[metric.key])} against {accuracy(other, metric)}, a difference of {100 * difference:+.1f} points"
    )
    errors = [error for each in (row, other) if (error := standard_error(each, metric)) is not None]
    if len(errors) == 2 and any(errors):
        ratio = abs(difference) / math.hypot(*errors)
        verdict = "outside" if ratio > 1.96 else "inside"
        text += (
            f" ({ratio:.1f} standard errors of the items, unpaired, one seed: {verdict} the 95 % interval of chance)"
        )
    if row["tokens"] is not None and other["tokens"] is not None:
        text += f"; the baseline saw {count(other['tokens'])} tokens, {row['stage']} {count(row['tokens'])}"
    return f"{text}."

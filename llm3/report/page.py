"""The page of a run: what each stage gained and what it cost, in sentences that are computed from the rows."""

import math
from collections.abc import Iterator
from pathlib import Path

from llm3.files import MATRIX, REPORT, write_atomic
from llm3.report import cost, seeds
from llm3.report.details import in_detail, repeated
from llm3.report.matrix import Figure, complete, figures, majority, parent_of, standard_error, write_matrix
from llm3.report.plots import plot_losses, plot_matrix, plot_seeds
from llm3.report.replicates import Recipe, collapsed, recipes, unreplicated
from llm3.report.table import METRIC_NAMES, PERCENTAGES, REPLICATES_NOTE, markdown, markdown_table, trained
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
    details: dict[str, dict] | None = None,
) -> None:
    """Write DIR/report.md with DIR/matrix.json, DIR/matrix.png and DIR/loss.png; with replicates, DIR/seeds.png.

    `rows` and `baselines` are as in `llm3.report.matrix`, `histories` as in `plot_losses`; `command` made the run;
    `facts` (name -> value: device, versions, seed, ...) are listed; `details` are {stage: what its evaluations say
    beyond figures}, of which the page has those of the last stage. Raises ValueError for a figure that is not finite.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    whole, beside = complete(rows, baselines)
    plot_matrix(directory / "matrix.png", collapsed(whole), collapsed(beside))
    found = recipes([*whole, *beside])
    plot_losses(directory / "loss.png", together(histories, found))
    if found:
        plot_seeds(directory / "seeds.png", found)
    text = page(rows, baselines, title=title, command=command, facts=facts, details=details)
    write_atomic(directory / REPORT, text)
    write_matrix(directory / MATRIX, rows, baselines)  # the last: it says that the report is whole


def page(
    rows: list[dict],
    baselines: list[dict],
    *,
    title: str,
    command: str,
    facts: dict,
    details: dict[str, dict] | None = None,
) -> str:
    """The text of report.md."""
    rows, baselines = complete(rows, baselines)
    shown, beside = collapsed(rows), collapsed(baselines)
    single = unreplicated(rows)
    parts = [f"# {title}", markdown(shown, beside), LEGEND]
    if len(single) < len(rows):
        parts.append(f"{REPLICATES_NOTE}; matrix.json has the row of every seed.")
    parts += ["![Figures by stage](matrix.png)", "## What each stage gained and what it cost"]
    for row in single:
        if (parent := parent_of(rows, row)) is not None:
            sentences = stage_sentences(figures(rows), parent, row)
            parts += [f"**{row['stage']}**, from {parent['stage']}:", "\n".join(f"- {line}" for line in sentences)]
    if tasks := [f"- {line}" for line in task_sentences(single, unreplicated(baselines))]:
        parts += ["## The tasks", "\n".join(tasks)]
    if compared := seeds.section([*rows, *baselines]):
        parts += [*compared, "![Accuracy by trained parameters](seeds.png)"]
    heads, lines = cost.savings([*shown, *beside])
    if lines:
        parts += ["## What it takes", markdown_table(heads, lines), cost.LEGEND]
    parts += in_detail(rows, details or {})
    parts += repeated([*single, *unreplicated(baselines)])
    parts += ["## Training", "![Loss by step](loss.png)"]
    parts += ["## How to reproduce it", f"```bash\n{command}\n```"]
    if facts:
        parts.append("\n".join(f"- {name}: {value}" for name, value in facts.items()))
    return "\n\n".join(parts) + "\n"


def together(histories: dict[str, list[dict]], found: list[Recipe]) -> dict[str, list[dict]]:
    """The histories with those of each recipe as one, its lines in the order of their steps."""
    names = {row["stage"]: recipe.label for recipe in found for row in recipe.rows}
    joined: dict[str, list[dict]] = {}
    for stage, lines in histories.items():
        joined.setdefault(names.get(stage, stage), []).extend(lines)
    return {name: sorted(lines, key=lambda line: line["step"]) for name, lines in joined.items()}


LEGEND = (
    "Bits per byte: less is better; in brackets, the change since the stage's parent. Rows in italics are baselines, "
    "outside the chain of stages. Tokens, FLOPs and time are those of the stage's steps alone, without compiling, "
    "saving and evaluating. Peak memory is that of the process while the stage trained; on an accelerator, that of a "
    "device since the process began."
)


def stage_sentences(columns: list[Figure], parent: dict, row: dict) -> Iterator[str]:
    """What `row` changed since `parent`, a sentence a figure; what it forgot; what it cost. The rows are complete."""
    shared = [figure for figure in columns if parent[figure.key] is not None and row[figure.key] is not None]
    for figure in shared:
        yield f"{words(figure.evaluation).capitalize()}: {change(figure, parent[figure.key], row[figure.key])}."
    texts = [figure for figure in shared if figure.metric == "bits_per_byte"]
    if texts and parent["tokens"]:  # an untrained parent has learnt nothing that could be forgotten
        lost = [
            f"{words(figure.evaluation)} text costs {row[figure.key] - parent[figure.key]:.3f} bits a byte more"
            for figure in texts
            if row[figure.key] > parent[figure.key]
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


def change(figure: Figure, before: float, after: float) -> str:
    """One figure before and after, and by how much it changed: relative for bits per byte, in points for shares."""
    if figure.metric in PERCENTAGES:
        name = METRIC_NAMES.get(figure.metric, words(figure.metric))
        return f"{name} {percent(before)} → {percent(after)} ({100 * (after - before):+.1f} points)"
    name = "bits per byte" if figure.metric == "bits_per_byte" else words(figure.metric)
    relative = f" ({100 * (after - before) / before:+.1f} %)" if before else ""
    return f"{before:.3f} → {after:.3f} {name}{relative}"


def task_sentences(rows: list[dict], baselines: list[dict]) -> Iterator[str]:
    """The last accuracy of each task against the majority class and each baseline. All rows are complete."""
    for figure in figures([*rows, *baselines]):
        scored = [row for row in rows if row[figure.key] is not None]
        if figure.metric != "accuracy" or not scored:
            continue
        last, name = scored[-1], words(figure.evaluation)
        text = f"**{name}**: {accuracy(last, figure)} after {last['stage']}"
        if (chance := majority(last, figure.evaluation)) is not None:
            text += f", against {percent(chance)} for the majority class"
        yield f"{text}."
        for row in baselines:
            if row[figure.key] is not None:
                yield f"**{name}**, {last['stage']} against {row['stage']}: {versus(last, row, figure)}"


def accuracy(row: dict, figure: Figure) -> str:
    """An accuracy with its standard error, where the number of items is known."""
    error = standard_error(row, figure)
    if error is None:
        return percent(row[figure.key])
    items = row[f"{figure.evaluation}_items"]
    return f"{percent(row[figure.key])} (standard error {100 * error:.1f} points, {items} items)"


def versus(row: dict, other: dict, figure: Figure) -> str:
    """By how much `row` is better than the baseline `other`, and whether the number of items can tell."""
    difference = row[figure.key] - other[figure.key]
    text = (
        f"{percent(row[figure.key])} against {accuracy(other, figure)}, a difference of {100 * difference:+.1f} points"
    )
    errors = [standard_error(row, figure), standard_error(other, figure)]
    if None not in errors and any(errors):
        ratio = abs(difference) / math.hypot(*errors)
        verdict = "outside" if ratio > 1.96 else "inside"
        text += (
            f" ({ratio:.1f} standard errors of the items, unpaired, one seed: {verdict} the 95 % interval of chance)"
        )
    if row["tokens"] is not None and other["tokens"] is not None:
        text += f"; the baseline saw {count(other['tokens'])} tokens, {row['stage']} {count(row['tokens'])}"
    return f"{text}."

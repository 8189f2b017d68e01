"""The report that compares several runs with the first of them: what is comparable, and what is not."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llm3.errors import listed
from llm3.report import compare
from llm3.report.compare import Compared
from llm3.report.entries import written
from llm3.report.escape import block, escaped
from llm3.report.material import Material
from llm3.report.plots.curves import Curve, Panel, plot_curves
from llm3.report.plots.forest import Effect, Forest, plot_forest
from llm3.report.plots.svg import look
from llm3.report.progress import means, points, smoothed
from llm3.report.table import markdown_table

LEGEND = (
    "Stages of one name are compared, over the items of an evaluation; in brackets, 95 % intervals. p is corrected for "
    "all tests between two runs (Holm). A metric is compared only if both runs measured it on the same data. Tests "
    "over items say nothing about other seeds."
)


class Run(NamedTuple):
    """A run to compare. config: all its fields; surroundings: its tokenizer, code and machine."""

    name: str
    material: Material
    config: Mapping[str, Any]
    surroundings: Mapping[str, Any]


def title(runs: Sequence[Run]) -> str:
    """The title of the page."""
    return f"Runs compared: {', '.join(run.name for run in runs)}"


def page(runs: Sequence[Run]) -> tuple[str, dict[str, str]]:
    """The Markdown of the page, and its figures by name. runs: two or more; the others are compared with the first."""
    first, *others = runs
    found = [compare.compared(first.material, other.material) for other in others]
    figures: dict[str, str] = {}
    parts = [f"# {escaped(title(runs))}", verdict(first, others, found)]
    parts += ["## All runs", values_table(runs, found)]
    for number, (other, each) in enumerate(zip(others, found, strict=True), 1):
        parts += pair_section(first, other, each)
        if panels := forests(first, other, each):
            name = f"differences_{number}.svg"
            figures[name] = plot_forest(panels)
            parts.append(f"![Intervals of all differences](figures/{name})")
    if panels_of_loss := losses(runs):
        figures["loss.svg"] = plot_curves(panels_of_loss)
        parts += ["## Training loss", "![Training loss by stage](figures/loss.svg)", "The loss is smoothed."]
    for other in others:
        parts += differences(first, other)
    return "\n\n".join(parts) + "\n", figures


def verdict(first: Run, others: Sequence[Run], found: Sequence[list[Compared]]) -> str:
    """One sentence: how many metrics of stages are better, worse, the same, and not comparable."""
    phrases = []
    for other, each in zip(others, found, strict=True):
        tested = [one for one in each if one.difference is not None]
        numbers = [sum(one.outcome == outcome for one in tested) for outcome in (1, -1, 0)]
        phrases.append(
            f"{escaped(other.name)} is better than {escaped(first.name)} beyond chance in {numbers[0]} and worse in "
            f"{numbers[1]} of {len(each)} metrics of stages, no difference is shown in {numbers[2]}, and "
            f"{len(each) - len(tested)} cannot be compared"
        )
    return f"**{'; '.join(phrases)}.**"


def values_table(runs: Sequence[Run], found: Sequence[list[Compared]]) -> str:
    """A line for each metric of a stage that the first run shares with another."""
    shared = {(each.stage, each.measure.key): each for pair in found for each in pair}
    lines = []
    for (stage, key), each in shared.items():
        rows = [next((row for row in run.material.stages if row["stage"] == stage), {}) for run in runs]
        lines.append([f"{stage}: {each.name}", *(written(row.get(key), each.measure) for row in rows)])
    if not lines:
        return "No stage has the same metric in two of these runs."
    return markdown_table(["stage and metric", *(escaped(run.name) for run in runs)], lines)


def pair_section(first: Run, other: Run, found: list[Compared]) -> list[str]:
    """The tables of two runs, why metrics are not compared, and the stages that only one of them has."""
    names = [escaped(run.name) for run in (first, other)]
    parts = [f"## {names[1]} against {names[0]}", LEGEND]
    for metric, lines in compare.tables(found, names).items():
        parts += [f"**{metric}**", markdown_table(compare.heads(*names), lines)]
    reasons = [f"- {each.stage}, {each.name}: {compare.LEGEND[each.reason]}." for each in found if each.reason]
    for own, name, missing in ((first, names[0], other), (other, names[1], first)):
        if stages := compare.alone(own.material, missing.material):
            reasons.append(f"- Only {name} has {listed(stages)}.")
    return [*parts, *(["Not comparable:", "\n".join(reasons)] if reasons else [])]


def forests(first: Run, other: Run, found: list[Compared]) -> list[Forest]:
    """The differences that were tested, a panel for each metric."""
    groups: dict[str, list[Compared]] = {}
    for each in found:
        if each.difference is not None:
            groups.setdefault(each.name, []).append(each)
    panels = []
    for name, group in groups.items():
        effects = [
            Effect(each.stage, each.difference.value, each.difference.low, each.difference.high, each.outcome)
            for each in group
            if each.difference is not None
        ]
        better = "lower" if group[0].measure.lower_is_better else "higher"
        title = f"{other.name} - {first.name} ({better} is better)"
        panels.append(Forest(name, title, effects, scale=100 if group[0].measure.shares else 1))
    return panels


def losses(runs: Sequence[Run]) -> list[Panel]:
    """The training loss of each stage that all runs logged, by step."""
    shared = [
        stage
        for stage in runs[0].material.histories
        if all(points(run.material.histories.get(stage, []), "loss") for run in runs)
    ]
    return [
        Panel(
            stage,
            "step",
            "nats per target",
            [
                Curve(run.name, smoothed(means(points(run.material.histories[stage], "loss"))), look(index))
                for index, run in enumerate(runs)
            ],
            [],
        )
        for stage in shared
    ]


def differences(first: Run, other: Run) -> list[str]:
    """The fields in which two runs differ."""
    names = f"{escaped(first.name)} / {escaped(other.name)}"
    parts = []
    for name, own, theirs in (
        ("Config", first.config, other.config),
        ("Code, tokenizer and machine", first.surroundings, other.surroundings),
    ):
        lines = list(compare.field_differences(dict(own), dict(theirs)))
        parts += [f"## {name}: {names}", block("\n".join(lines)) if lines else "No difference."]
    return parts

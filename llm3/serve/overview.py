"""What the page shows of the runs besides answers: the stages, where each comes from, and how it was evaluated."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from llm3.data.prompts import mask_text
from llm3.files import MATRIX
from llm3.report.figures import column_shades
from llm3.report.matrix import complete, metrics_of, read_matrix
from llm3.report.replicates import collapsed
from llm3.report.table import cell, header
from llm3.report.units import count
from llm3.serve.stages import Served

# What a stage does with a text if nothing else is asked of it: the first of these tasks that it has.
OWN_TASKS = ("classify", "chat", "completions", "fill")


class Column(NamedTuple):
    """A stage that answers. parent: the nearest of its ancestors that answers too, "" if none does.

    own_task: see `OWN_TASKS`; "" if it has none of them. mask: how a text spells the mask token; "": it has none.
    """

    name: str
    tasks: tuple[str, ...]
    own_task: str
    parent: str
    note: str
    labels: tuple[str, ...] = ()
    mask: str = ""


class Node(NamedTuple):
    """A model of the lineage. key: unique. parent: the key of another node, "" for none. column: its name, or ""."""

    key: str
    label: str
    parent: str
    note: str
    column: str = ""


class Cell(NamedTuple):
    """A cell of a matrix. shade: from 0 for the worst to 1 for the best trained stage; None: not compared."""

    text: str
    shade: float | None


class Evaluated(NamedTuple):
    """The matrix of a run. heads: of the columns after the name of the stage. rows: (stage, cells, baseline)."""

    run: str
    heads: list[str]
    rows: list[tuple[str, list[Cell], bool]]


class Overview(NamedTuple):
    """Everything that the page is made of."""

    title: str
    columns: list[Column]
    lineage: list[Node]
    matrices: list[Evaluated]


def overview(stages: Mapping[str, Served], tasks: Mapping[str, Sequence[str]]) -> Overview:
    """The page's content. tasks: {stage: what it can be asked}, as `/v1/models` lists them."""
    workdirs = dict.fromkeys(stage.trained.workdir.resolve() for stage in stages.values())
    names = [each.name for each in workdirs]
    nodes = lineage(stages)
    found = [evaluated(each) for each in workdirs]
    return Overview(
        f"{'Run' if len(names) == 1 else 'Runs'} {', '.join(names)}",
        [column(stage, tuple(tasks[name]), nearest_column(nodes, name)) for name, stage in stages.items()],
        nodes,
        [each for each in found if each],
    )


def column(stage: Served, tasks: tuple[str, ...], parent: str) -> Column:
    """The column of a stage."""
    meta, tokenizer = stage.trained.meta, stage.trained.tokenizer
    own = next((each for each in OWN_TASKS if each in tasks), "")
    labels = tuple(stage.trained.labels) if "classify" in tasks else ()
    mask = mask_text(tokenizer) if "fill" in tasks else ""
    return Column(stage.name, tasks, own, parent, f"{meta['kind']}, step {meta['step']:,}", labels, mask)


def lineage(stages: Mapping[str, Served]) -> list[Node]:
    """The stages and all of their ancestors, parents first. An ancestor in a run that is served is one of its stages.

    Ancestors are known from the metadata of the checkpoints, wherever they are now.
    """
    served = {(stage.trained.workdir.resolve(), stage.trained.name): name for name, stage in stages.items()}
    found: dict[str, Node] = {}
    for stage in stages.values():
        workdir, parent = stage.trained.workdir.resolve(), ""
        own = {"run": ".", "stage": stage.trained.name, **stage.trained.meta}
        for link in [*stage.trained.meta["lineage"], own]:
            node = _node(link, workdir, parent, served)
            parent = node.key
            if node.key not in found or link is own:
                found[node.key] = node
    return list(found.values())


def _node(link: Mapping, workdir: Path, parent: str, served: Mapping[tuple[Path, str], str]) -> Node:
    if "stage" not in link:  # a pretrained model
        return Node(f"model {link['model']}", Path(link["model"]).name, parent, f"pretrained {link['family']}")
    run = (workdir / link["run"]).resolve()
    name = served.get((run, link["stage"]), "")
    label = name or (link["stage"] if run == workdir else f"{run.name}/{link['stage']}")
    tokens = (link.get("cost") or {}).get("tokens")
    seen = f", {count(tokens)} tokens" if tokens is not None else ""
    note = f"{link['kind']}, step {link['step']:,}{seen}, {link['params_digest'][:7]}"
    key = f"{run} {link['stage']}" if name else f"{run} {link['stage']} {link['step']}"
    return Node(key, label, parent, note, name)


def nearest_column(nodes: Sequence[Node], name: str) -> str:
    """The name of the nearest ancestor of a stage that has a column; "" if none has."""
    by_key = {each.key: each for each in nodes}
    node = next(each for each in nodes if each.column == name)
    while node.parent:
        node = by_key[node.parent]
        if node.column:
            return node.column
    return ""


def evaluated(workdir: Path) -> Evaluated | None:
    """The matrix of a run as its report has it; None before there is one, or if its file is damaged."""
    try:
        rows, baselines = complete(*read_matrix(workdir / MATRIX))
        metrics = metrics_of([*rows, *baselines])
        shown, aside = collapsed(rows), collapsed(baselines)
        shades = [column_shades([*shown, *aside], metric) for metric in metrics]
        cells = [
            [Cell(cell(row, metric), shade[at]) for metric, shade in zip(metrics, shades, strict=True)]
            for at, row in enumerate([*shown, *aside])
        ]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    heads = [" ".join(header(metric).split()) for metric in metrics]
    names = [(str(row["stage"]), False) for row in shown] + [(str(row["stage"]), True) for row in aside]
    found = [(name, own, baseline) for (name, baseline), own in zip(names, cells, strict=True)]
    return Evaluated(workdir.name, heads, found) if metrics else None

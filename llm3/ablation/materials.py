"""The stage runs of an ablation as the material of a run's report: what is drawn of stages is drawn of arms too."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from llm3.ablation.study import Planned, Study
from llm3.files import SAMPLES
from llm3.report.logs import read_json_lines, read_metrics
from llm3.report.material import Columns, Material
from llm3.report.predictions import read_predictions


class Group(NamedTuple):
    """A stage of one or more variants over its seeds.

    label: "ARM: STAGE". arms: the names of the variants. runs: {seed: stage run}, each run once. parent: the label of
    another group, "" for the first stage.
    """

    label: str
    stage: str
    arms: list[str]
    runs: dict[int, str]
    parent: str


class StageRun(NamedTuple):
    """A finished stage run. parent: the name of another one, "" for the first stage."""

    row: dict[str, Any]
    details: dict[str, Any] | None
    folder: Path
    parent: str


def groups(variants: Mapping[str, Planned]) -> list[Group]:
    """The stages of variants, parents first; a stage that variants share is there once. variants: by short name."""
    owners: dict[tuple, list[str]] = {}
    for name, variant in variants.items():
        for depth in range(len(variant.stages)):
            owners.setdefault(_key(variant, depth), []).append(name)
    labels = {key: f"{_owners(names)}: {variants[names[0]].stages[len(key) - 1]}" for key, names in owners.items()}
    found = []
    for key, names in owners.items():
        runs: dict[int, str] = {}
        for seed, name in zip(variants[names[0]].chains, key[-1], strict=True):
            if name not in runs.values():
                runs[int(seed)] = name
        stage = variants[names[0]].stages[len(key) - 1]
        found.append(Group(labels[key], stage, names, runs, labels.get(key[:-1], "")))
    return found


def _key(variant: Planned, depth: int) -> tuple[tuple[str, ...], ...]:
    """The stage runs over all seeds, of a stage and its ancestors."""
    return tuple(tuple(chain[at] for chain in variant.chains.values()) for at in range(depth + 1))


def _owners(names: list[str]) -> str:
    return " + ".join(names) if len(names) < 3 else f"{names[0]} + {len(names) - 1} more"


def finished(study: Study) -> dict[str, StageRun]:
    """{stage run: its results}, of the chains that are finished."""
    chains = {each.name: each.chains for each in study.variants}
    found: dict[str, StageRun] = {}
    for each in study.outcomes:
        names = chains[each.variant][str(each.seed)]
        for name, parent, stage in zip(names, ["", *names], each.rows, strict=False):
            found[name] = StageRun(each.rows[stage], each.details[stage], each.folders[stage], parent)
    return found


def material(study: Study, variants: Mapping[str, Planned], one_seed: bool = False) -> Material:
    """The finished stage runs of variants as stages; those that differ by seed are replicates of one recipe.

    variants: by short name. one_seed: only the first seed of each.
    """
    done, found = finished(study), groups(variants)
    if one_seed:
        found = [each._replace(runs=dict(list(each.runs.items())[:1])) for each in found]
    titles = {
        name: f"{group.label}_{seed}" if len(group.runs) > 1 else group.label
        for group in found
        for seed, name in group.runs.items()
    }
    runs = {titles[name]: done[name] for name in titles if name in done}
    rows = [
        done[name].row
        | {"stage": titles[name], "parent": titles.get(done[name].parent), "seed": seed}
        | {"recipe": group.label if len(group.runs) > 1 else None}
        for group in found
        for seed, name in group.runs.items()
        if name in done
    ]

    @cache
    def predictions(stage: str, evaluation: str) -> Columns | None:
        return read_predictions(runs[stage].folder, evaluation)

    return Material(
        rows,
        histories={title: read_metrics(each.folder) for title, each in runs.items()},
        details={title: each.details for title, each in runs.items()},
        predictions=predictions,
        samples={title: lines for title, each in runs.items() if (lines := read_json_lines(each.folder / SAMPLES))},
    )

"""An ablation as it is in its directory: its plan, and the results of the stage runs that are finished."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llm3.ablation.arms import chain as chain_of
from llm3.ablation.arms import changed_base
from llm3.ablation.costs import Priced, difference, reference_arm, reference_of
from llm3.ablation.graph import NODE, Graph, directory
from llm3.ablation.local import FAILED
from llm3.ablation.schema import AblationConfig
from llm3.config import load
from llm3.config.schema import as_dict
from llm3.errors import UserError
from llm3.files import DETAILS, PLAN, ROW, read_json, write_json
from llm3.report.compare import field_differences
from llm3.report.predictions import Columns, read_predictions
from llm3.stages.evaluated import current, definition
from llm3.stages.origin import STAND_IN, complete


class Planned(NamedTuple):
    """A variant of a plan.

    stages: of its chain, the first one first; the last one counts. budget: {tokens, flops, seconds}. excess: how much
    more of `match` it uses than the reference, as a share of it; None: nothing is matched. adjusted: [stage, steps
    before, steps now]. differs: lines "field: base X, here Y". chains: {seed: its stage runs}.
    """

    name: str
    arm: str
    cell: dict[str, str]
    stages: list[str]
    budget: dict[str, float | None]
    excess: float | None
    adjusted: list[Any] | None
    differs: list[str]
    chains: dict[str, list[str]]


class Outcome(NamedTuple):
    """A variant at one seed, of which all stage runs are finished.

    rows: {stage: row}, the first stage first; the last one counts. folders: {stage: its folder}.
    """

    variant: str
    seed: int
    rows: dict[str, dict[str, Any]]
    details: dict[str, dict[str, Any] | None]
    folders: dict[str, Path]

    @property
    def stage(self) -> str:
        """The stage whose row counts."""
        return [*self.rows][-1]

    @property
    def row(self) -> dict[str, Any]:
        """The row that counts."""
        return self.rows[self.stage]

    def predictions(self, evaluation: str, stage: str = "") -> Columns | None:
        """The results of an evaluation item by item, by default of the stage whose row counts; None: not kept."""
        return read_predictions(self.folders[stage or self.stage], evaluation)


@dataclass(frozen=True)
class Study:
    """A plan and its results. outcomes: variants in order, and the seeds of each in order. failed: {stage run: why}."""

    workdir: Path
    config: AblationConfig
    command: str
    variants: list[Planned]
    outcomes: list[Outcome]
    failed: Mapping[str, str]
    declared_after: Mapping[str, int]  # {comparison: chains of its arms that were finished when it was declared}

    @property
    def reference(self) -> str:
        """The arm that the others are held against."""
        return reference_arm(self.config)

    def of(self, variant: str) -> list[Outcome]:
        """The finished seeds of a variant."""
        return [each for each in self.outcomes if each.variant == variant]


def write_plan(workdir: Path, config: AblationConfig, priced: list[Priced], graph: Graph, command: str) -> None:
    """Write the plan of an ablation. A comparison that was declared before, and is the same, keeps when that was."""
    before = read_json(workdir / PLAN) or {"comparisons": {}}
    comparisons = {}
    for name, each in as_dict(config)["comparisons"].items():
        known = before["comparisons"].get(name)
        after = known["after"] if known and known["declared"] == each else _finished(workdir, graph, each)
        comparisons[name] = {"declared": each, "after": after}
    plan = {
        "command": command,
        "config": as_dict(config),
        "comparisons": comparisons,
        "variants": [each._asdict() for each in planned(config, priced, graph)],
    }
    write_json(workdir / PLAN, plan)


def planned(config: AblationConfig, priced: list[Priced], graph: Graph) -> list[Planned]:
    """The variants of a plan."""
    base = as_dict(complete(changed_base(config)))
    found = []
    for each in priced:
        variant, excess = each.variant, difference(each, reference_of(each, priced, config), config.match)
        adjusted = list(each.adjusted) if each.adjusted else None
        chains = {str(seed): graph.chains[variant.name, seed] for seed in config.seeds}
        differs = list(_differs(base, as_dict(each.config), each.chain))
        parts = (variant.name, variant.arm, variant.cell, each.chain, each.budget._asdict(), excess, adjusted)
        found.append(Planned(*parts, differs, chains))
    return found


def _differs(base: dict[str, Any], own: dict[str, Any], chain: list[str]) -> Iterator[str]:
    """In words, how the config of a variant differs from the base."""
    ancestors = chain_of(base, chain[-1]) if chain[-1] in base["stages"] else []
    if left_out := [name for name in ancestors if name not in chain]:
        yield f"without {', '.join(left_out)}"
    for section in (key for key in base if key != "stages"):
        yield from field_differences({section: base[section]}, {section: own[section]})
    for name in chain:
        theirs = base["stages"].get(name)
        if theirs is None:
            yield f"stage {name} is not in the base"
        else:
            yield from field_differences({"stages": {name: theirs}}, {"stages": {name: own["stages"][name]}})


def _finished(workdir: Path, graph: Graph, comparison: Mapping[str, Any]) -> int:
    """How many chains of the two arms are finished."""
    arms = {comparison["ours"], comparison["theirs"]}
    chains = [chain for (variant, _), chain in graph.chains.items() if variant.partition(", ")[0] in arms]
    return sum(_row(workdir, chain[-1]).is_file() for chain in chains)


def _row(workdir: Path, name: str) -> Path:
    return directory(workdir, name) / name.rpartition("-")[0] / ROW


def read_study(workdir: Path) -> Study:
    """The ablation in a directory. Raises UserError if there is none."""
    plan = read_json(workdir / PLAN)
    if plan is None:
        raise UserError(f"{workdir} holds no ablation: {PLAN} does not exist")
    config = load.read_as(AblationConfig, plan["config"])
    variants = [Planned(**each) for each in plan["variants"]]
    outcomes = [
        outcome
        for variant in variants
        for seed, chain in variant.chains.items()
        if (outcome := read_outcome(workdir, variant.name, int(seed), chain)) is not None
    ]
    after = {name: each["after"] for name, each in plan["comparisons"].items()}
    failed = read_json(workdir / FAILED) or {}
    return Study(workdir, config, plan["command"], variants, outcomes, failed, after)


def read_outcome(workdir: Path, variant: str, seed: int, chain: list[str]) -> Outcome | None:
    """The results of a chain of stage runs, by the evaluations of its last one; None if one is not finished."""
    paths = [_row(workdir, name) for name in chain]
    if not all(path.is_file() for path in paths):
        return None
    given = read_json(directory(workdir, chain[-1]) / NODE)
    own = load.read({key: value for key, value in given.items() if key != load.FOLDER} | {"model": STAND_IN})
    now = {each: {"config": definition(own, each)} for each in own.evaluations}
    rows, details, folders = {}, {}, {}
    for path in paths:
        row = read_json(path)
        stage = row["stage"]
        rows[stage], details[stage] = current(path.parent, row, read_json(path.parent / DETAILS), now)
        folders[stage] = path.parent
    return Outcome(variant, seed, rows, details, folders)

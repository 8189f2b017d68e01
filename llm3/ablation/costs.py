"""What the stages of a variant cost, and the steps of an adjusted stage so that variants use equally much."""

import copy
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from llm3.ablation.arms import BASE, Variant, chain, chain_config
from llm3.ablation.schema import AblationConfig
from llm3.config.schema import MeshConfig, RunConfig, StageConfig, as_dict
from llm3.data.library import Library
from llm3.distributed.mesh_axes import MESH_AXES
from llm3.errors import UserError
from llm3.planning.plan import on_abstract_mesh
from llm3.stages.experiment import read_library
from llm3.stages.rules import check, data_sources
from llm3.stages.stage import read_stage
from llm3.stages.workdir import UNRECORDED

# fields of a stage that its step does not depend on: stages with equal other fields are timed once
NOT_IN_PROGRAM = {"steps", "kind", "start", "baseline", "seed", "order_seed", *UNRECORDED, *StageConfig.VALIDATION}
EQUAL = 0.01  # budgets that differ by more than this share are named


class Cost(NamedTuple):
    """What is used: tokens, with padding; FLOPs as executed; seconds of steps, None if they are not known."""

    tokens: float = 0.0
    flops: float = 0.0
    seconds: float | None = 0.0

    def __add__(self, other: "Cost") -> "Cost":  # type: ignore[override]
        seconds = None if None in (self.seconds, other.seconds) else self.seconds + other.seconds  # type: ignore[operator]
        return Cost(self.tokens + other.tokens, self.flops + other.flops, seconds)

    def times(self, factor: float) -> "Cost":
        """This many times as much."""
        return Cost(self.tokens * factor, self.flops * factor, self.seconds and self.seconds * factor)


class StageCost(NamedTuple):
    """The cost of all steps of a stage, and of one more step at its end. key: equal for equal programs."""

    total: Cost
    step: Cost
    key: str


class Priced(NamedTuple):
    """A variant with its config, its chain of stages, their data, and the cost of each. adjusted: steps before, now."""

    variant: Variant
    config: RunConfig
    chain: list[str]
    library: Library
    costs: dict[str, StageCost]
    budget: Cost
    adjusted: tuple[str, int, int] | None = None


Timed = Callable[[RunConfig, str, str], float | None]  # (config, stage, key of the program of a step) -> its seconds


def not_timed(config: RunConfig, name: str, key: str) -> float | None:
    """The seconds of a step where nobody needs them."""
    return None


def _digest(record: list[str]) -> str:
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()[:12]


class Prices:
    """Prices variants; what they have in common is read and traced once.

    timed: the seconds of a step.
    """

    def __init__(self, workdir: Path, timed: Timed = not_timed):
        self._workdir, self._timed = workdir, timed
        self._libraries: dict[str, Library] = {}
        self._costs: dict[str, StageCost] = {}

    def price(self, variant: Variant, shared: Collection[str] = ()) -> Priced:
        """The cost of a variant. Raises UserError, with its name, for a config that cannot run."""
        try:
            config = chain_config(variant.values, variant.stage)
            check(config)
            library, names = self.library(config), chain(variant.values, variant.stage)
            costs = {name: self._stage(config, name, library) for name in names}
        except UserError as error:
            raise UserError(f"{variant.name}: {error}") from None
        budget = Cost()
        for name in names:
            budget += costs[name].total.times(1 / variant.shared_by if name in shared else 1)
        return Priced(variant, config, names, library, costs, budget)

    def library(self, config: RunConfig) -> Library:
        """The sources of a config; equal ones are opened once."""
        parts = [repr(config.sources), repr(config.tokenizer), config.data_dir, config.cache_dir]
        starts = [repr(each.start) for each in config.stages.values() if isinstance(each.start, dict)]
        key = json.dumps([*parts, *starts])
        if key not in self._libraries:
            self._libraries[key] = read_library(config, self._workdir)
        return self._libraries[key]

    def _stage(self, config: RunConfig, name: str, library: Library) -> StageCost:
        own = config.stages[name]
        data = [library.cache(source, "train").fingerprint for source in data_sources(config, name)]
        record = [repr(config.model), repr(config.mesh), library.tokenizer.hash, *data]
        key = _digest([*record, repr(dataclasses.replace(own, seed=None, order_seed=None))])
        if key not in self._costs:
            stage = read_stage(config, name, self._workdir, library).computed_in("float32")
            with on_abstract_mesh(config.mesh, fewest_devices(config.mesh)) as mesh:
                phases = stage.phases(mesh)
            program = {field: value for field, value in as_dict(own).items() if field not in NOT_IN_PROGRAM}
            seconds = self._timed(config, name, _digest([*record, json.dumps(program, sort_keys=True)]))
            flops = sum(each.hardware_flops_per_step * (each.stop - each.first) for each in phases)
            step = Cost(stage.step_tokens, phases[-1].hardware_flops_per_step, seconds)
            total = Cost(stage.step_tokens * own.steps, flops, None if seconds is None else seconds * own.steps)
            self._costs[key] = StageCost(total, step, key)
        return self._costs[key]


def fewest_devices(mesh: MeshConfig) -> int:
    """The fewest devices that a mesh can have; the FLOPs of a step do not depend on how many there are."""
    return math.prod(abs(getattr(mesh, axis)) for axis in MESH_AXES)  # -1: as many as there are


def price_all(variants: Sequence[Variant], config: AblationConfig, prices: Prices) -> list[Priced]:
    """The cost of all variants, with the steps of adjusted stages set. Raises UserError."""
    found = [prices.price(each, config.shared) for each in variants]
    return [
        adjusted(each, reference_of(each, found, config), config, prices) if each.variant.adjust else each
        for each in found
    ]


def reference_arm(config: AblationConfig) -> str:
    """The arm that the others are held against."""
    return config.reference or next(iter(config.arms), BASE)


def reference_of(priced: Priced, others: Sequence[Priced], config: AblationConfig) -> Priced:
    """The reference arm at the same point of the grid."""
    arm, cell = reference_arm(config), priced.variant.cell
    return next(each for each in others if each.variant.arm == arm and each.variant.cell == cell)


def adjusted(priced: Priced, reference: Priced, config: AblationConfig, prices: Prices) -> Priced:
    """A variant whose stage `adjust` has the number of steps with which it uses as much as the reference.

    Raises UserError if that is less than one step.
    """
    variant, name, unit = priced.variant, priced.variant.adjust, config.match
    if name not in priced.chain:
        raise UserError(f"{variant.where}.adjust={name!r}: not among its stages {', '.join(priced.chain)}")
    share = 1 / variant.shared_by if name in config.shared else 1
    step = getattr(priced.costs[name].step, unit)
    missing = getattr(reference.budget, unit) - getattr(priced.budget, unit)
    before = priced.config.stages[name].steps
    steps = before + round(missing / (step * share))
    if steps < 1:
        raise UserError(
            f"{variant.name}: without {name} it uses more {unit} than {reference.variant.name}: no number of its steps "
            "makes them equal"
        )
    values = copy.deepcopy(variant.values)
    values["stages"][name]["steps"] = steps
    again = prices.price(variant._replace(values=values), config.shared)
    return again._replace(adjusted=(name, before, steps))


def difference(priced: Priced, reference: Priced, unit: str) -> float | None:
    """How much more of a unit a variant uses than the reference, as a share of the reference; None for no unit."""
    return getattr(priced.budget, unit) / getattr(reference.budget, unit) - 1 if unit else None

"""Every field of an ablation's config, with checks that need no device; `llm3.ablation.load` reads them."""

import dataclasses
from typing import Any

from llm3.errors import UserError, nearest, one_of

KINDS = ("pretrain", "posttrain", "finetune")
PARTS = (*KINDS, *(f"{kind}.{part}" for kind in KINDS for part in ("init", "order")))
EXPECTATIONS = ("better", "worse", "no worse", "different")
UNITS = ("tokens", "flops", "seconds")
SHARED_BY = "shared_by"  # a field of the grid that is no field of the base


@dataclasses.dataclass(frozen=True)
class ArmConfig:
    """One arm: how it differs from the base experiment."""

    # fields of the base and their values here: {"stages.finetune.train": "top(2)"}
    change: dict[str, Any] = dataclasses.field(default_factory=dict)
    # stages to leave out; the stages that start from one of them start from its parent instead
    without: list[str] = dataclasses.field(default_factory=list)
    stages: dict[str, Any] = dataclasses.field(default_factory=dict)  # these stages instead of those of the base
    stage: str = ""  # the stage whose row counts; "": that of the ablation
    adjust: str = ""  # the stage whose steps are set so that the arm uses as much of `match` as the reference
    note: str = ""  # a sentence for the report


@dataclasses.dataclass(frozen=True)
class ComparisonConfig:
    """A comparison of two arms, declared before there are results."""

    ours: str  # an arm
    theirs: str  # the arm it is compared with
    metric: str = ""  # the metric of a row; "": that of the ablation
    stage: str = ""  # the stage whose rows are compared; "": that whose row counts
    expect: str = "different"  # the expected result of ours: better, worse, no worse or different
    smallest: float = 0.0  # the smallest difference that counts, in units of the metric
    literature: str = ""  # the finding that this expects, with its source

    def __post_init__(self) -> None:
        one_of("comparisons.*.expect", self.expect, EXPECTATIONS)
        if not self.smallest >= 0:
            raise UserError(f"config: comparisons.*.smallest={self.smallest!r}: expected at least 0")
        if self.expect == "no worse" and not self.smallest:
            raise UserError(
                "config: comparisons.*.expect='no worse': needs `smallest`, the loss that would count as worse"
            )


@dataclasses.dataclass(frozen=True)
class AblationConfig:
    """Arms of one experiment, their seeds, and what is compared."""

    base: dict[str, Any]  # the fields of a run's config, or the path of its file, relative to this one
    metric: str  # the metric that decides, a key of a row: "task_accuracy"
    question: str = ""  # the question in one sentence
    change: dict[str, Any] = dataclasses.field(default_factory=dict)  # changes of the base in all arms
    # arms by name; empty: the base alone, at the points of the grid
    arms: dict[str, ArmConfig] = dataclasses.field(default_factory=dict)
    # every arm is trained at every point of the grid: {field: values}, or {name: {value: changes}}
    grid: dict[str, Any] = dataclasses.field(default_factory=dict)
    stage: str = ""  # the stage whose row counts; "": the last one that is no baseline
    seeds: list[int] = dataclasses.field(default_factory=lambda: [0, 1, 2, 3, 4])  # five or more for a verdict
    # what the seed changes: stages of these kinds, or only their new parameters ("finetune.init") or the order of their
    # data ("finetune.order")
    vary: list[str] = dataclasses.field(default_factory=lambda: ["pretrain", "posttrain", "finetune"])
    match: str = ""  # what arms should use equally much of: tokens, flops or seconds; "": nothing
    reference: str = ""  # the arm that the others are held against; "": the first one
    shared: list[str] = dataclasses.field(default_factory=list)  # stages whose cost grid.shared_by divides
    # comparisons by name; empty: every other arm with the reference
    comparisons: dict[str, ComparisonConfig] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.match:
            one_of("match", self.match, UNITS)
        for number, name in enumerate(self.vary):
            if name not in PARTS:
                raise UserError(f"config.vary[{number}]={name!r}: {nearest(name, PARTS)}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"config.seeds={self.seeds}: expected different numbers, at least one")
        if self.reference:
            self._known("reference", self.reference)
        for name, comparison in self.comparisons.items():
            for side in ("ours", "theirs"):
                self._known(f"comparisons.{name}.{side}", getattr(comparison, side))
            if comparison.ours == comparison.theirs:
                raise UserError(f"config.comparisons.{name}: compares {comparison.ours!r} with itself")
        for name, arm in self.arms.items():
            if not name or {",", "="} & set(name):
                raise UserError(f"config.arms: {name!r} cannot be the name of an arm: expected one without ',' and '='")
            if arm.adjust and not self.match:
                raise UserError(
                    f"config.arms.{name}.adjust={arm.adjust!r}: needs `match`, what arms use equally much of"
                )
            if arm.adjust and name == (self.reference or next(iter(self.arms))):
                raise UserError(f"config.arms.{name}.adjust: it is the arm that the others are held against")
            if arm.stages and arm.without:
                raise UserError(f"config.arms.{name}.without: has no effect beside `stages`, which names all stages")
        self._check_grid()

    def _known(self, field: str, arm: str) -> None:
        if arm not in self.arms:
            raise UserError(f"config.{field}={arm!r}: no such arm; {nearest(arm, self.arms)}")

    def _check_grid(self) -> None:
        for axis, values in self.grid.items():
            if not isinstance(values, list | dict) or not values:
                raise UserError(f"config.grid.{axis}={values!r}: expected a list of values, or {{value: changes}}")
            if isinstance(values, dict) and not all(isinstance(each, dict) for each in values.values()):
                raise UserError(f"config.grid.{axis}: expected {{value: {{field: value}}}}")
            if len({str(each) for each in values}) < len(values):
                raise UserError(f"config.grid.{axis}={values!r}: expected different values")
        numbers = self.grid.get(SHARED_BY, [1])
        if not (isinstance(numbers, list) and all(isinstance(each, int) and each >= 1 for each in numbers)):
            raise UserError(f"config.grid.{SHARED_BY}={numbers!r}: expected a list of numbers from 1")
        if SHARED_BY in self.grid and not (self.shared and self.match):
            raise UserError(f"config.grid.{SHARED_BY}: needs `shared`, the stages that are shared, and `match`")

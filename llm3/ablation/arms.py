"""The variants of an ablation: every arm at every point of its grid, as the fields of a run's config.

Pure functions of plain values: nothing is read, and no device is used.
"""

import copy
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from llm3.ablation.schema import SHARED_BY, AblationConfig, ArmConfig
from llm3.config import load
from llm3.config.schema import RunConfig, StageConfig
from llm3.errors import UserError, nearest
from llm3.files import INIT
from llm3.stages.origin import complete

BASE = "base"  # the arm of an ablation that names none


class Variant(NamedTuple):
    """An arm at a point of the grid.

    name: "ARM", or "ARM, AXIS=VALUE, ...". cell: {axis: value as text}. values: the fields of the config. where: the
    place in errors. stage: the stage whose row counts. adjust: the stage whose steps are to be set, "" for none.
    shared_by: how many pay for the shared stages together.
    """

    name: str
    arm: str
    cell: dict[str, str]
    values: dict[str, Any]
    where: str
    stage: str
    adjust: str
    shared_by: int


def variants(config: AblationConfig) -> list[Variant]:
    """All arms at all points, in the order of the config. Raises UserError for a change that cannot be made."""
    base = changed_base(config)
    arms, found = config.arms or {BASE: ArmConfig()}, []
    usual = counted_stage(base, config.stage, "config.stage")
    for name, arm in arms.items():
        where = f"config.arms.{name}" if config.arms else "config"
        for cell, changes, shared_by in _points(config.grid):
            values = changed(base, arm, where)
            for field, value in changes.items():
                if applies(values, field, base):
                    load.assign(RunConfig, values, field, copy.deepcopy(value), "config.grid")
            title = ", ".join([name, *(f"{axis}={value}" for axis, value in cell.items())])
            name_of_last = arm.stage or config.stage or ("" if arm.stages else usual)
            stage = counted_stage(values, name_of_last, where)
            if arm.adjust and arm.adjust not in values["stages"]:
                raise UserError(
                    f"{where}.adjust={arm.adjust!r}: no such stage; {nearest(arm.adjust, values['stages'])}"
                )
            found.append(Variant(title, name, cell, values, where, stage, arm.adjust, shared_by))
    return found


def changed_base(config: AblationConfig) -> dict[str, Any]:
    """The fields of the base with the changes of all arms. Raises UserError."""
    base = with_fixed_tokenizer(config.base)
    for field, value in config.change.items():
        load.assign(RunConfig, base, field, copy.deepcopy(value), "config.change")
    return base


def with_fixed_tokenizer(base: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the base whose tokenizer names its sources: it stays the same in arms without some stage."""
    values = copy.deepcopy(dict(base))
    own = values.setdefault("tokenizer", {})
    if not own.get("path") and not own.get("sources"):
        pretraining = [each["data"] for each in values["stages"].values() if each["kind"] == "pretrain"]
        own["sources"] = sorted({source for data in pretraining for source in data})
    return values


def changed(base: Mapping[str, Any], arm: ArmConfig, where: str) -> dict[str, Any]:
    """The fields of the base with the stages and the changes of an arm. Raises UserError."""
    values = copy.deepcopy(dict(base))
    if arm.stages:
        for name, own in arm.stages.items():
            load.check_section(StageConfig, own, f"{where}.stages.{name}")
        values["stages"] = copy.deepcopy(arm.stages)
    for name in arm.without:
        leave_out(values["stages"], name, f"{where}.without")
    for field, value in arm.change.items():
        load.assign(RunConfig, values, field, copy.deepcopy(value), f"{where}.change")
    return values


def applies(values: Mapping[str, Any], field: str, base: Mapping[str, Any]) -> bool:
    """Whether a field of the grid is there: not if it belongs to a stage that only this arm leaves out."""
    section, _, rest = field.partition(".")
    name = rest.partition(".")[0]
    return section != "stages" or name in values["stages"] or name not in base["stages"]


def leave_out(stages: dict[str, Any], name: str, where: str) -> None:
    """Remove a stage; those that start from it start from its parent. Raises UserError if there is no such stage.

    Without a parent left, a stage on unlabelled text becomes pretraining, and fine-tuning a baseline from the untrained
    model.
    """
    if name not in stages:
        raise UserError(f"{where}: no stage {name!r}; {nearest(name, stages)}")
    start = stages.pop(name).get("start")
    for own in stages.values():
        if _parent(own) == name:
            own["start"] = _moved_up(own["start"], start)
            if own["start"] is None and own["kind"] == "posttrain":
                own |= {"kind": "pretrain", "replay": 0.0}
            elif own["start"] is None:
                own |= {"start": INIT, "baseline": True}


def _parent(stage: Mapping[str, Any]) -> str | None:
    start = stage.get("start")
    if isinstance(start, dict):
        return None if start.get("run") else start.get("stage")
    return start


def _moved_up(own: Any, start: Any) -> Any:
    """The start of a stage whose parent is left out. start: that of the parent."""
    if start is None or start == INIT:
        return None
    rules = {key: own[key] for key in ("fresh", "drop") if isinstance(own, dict) and key in own}
    return (start if isinstance(start, dict) else {"stage": start}) | rules


def counted_stage(values: Mapping[str, Any], name: str, where: str) -> str:
    """The stage whose row counts: the given one, else the last one that is no baseline, else the last one."""
    stages = values["stages"]
    if not stages:
        raise UserError(f"{where}: no stage is left")
    if name:
        if name not in stages:
            raise UserError(f"{where}: no stage {name!r}, whose row counts; {nearest(name, stages)}")
        return name
    parents = {_parent(each) for each in stages.values()}
    ends = [each for each in stages if each not in parents]
    return ([each for each in ends if not stages[each].get("baseline")] or ends)[-1]


def chain(values: Mapping[str, Any], stage: str) -> list[str]:
    """A stage and its ancestors in the same config, the first one first."""
    found = [stage]
    while (parent := _parent(values["stages"][found[0]])) and parent in values["stages"]:
        if parent in found:
            break  # a cycle, which the rules refuse
        found.insert(0, parent)
    return found


def chain_config(values: Mapping[str, Any], stage: str) -> RunConfig:
    """The config of a stage and its ancestors alone. Raises UserError."""
    names = chain(values, stage)
    return complete(dict(values) | {"stages": {name: values["stages"][name] for name in names}})


def _points(grid: Mapping[str, Any]) -> Iterator[tuple[dict[str, str], dict[str, Any], int]]:
    """(cell, changes, shared_by) of every point of the grid."""
    axes = []
    last = [axis.rpartition(".")[2] for axis in grid]
    for axis, values in grid.items():
        short = axis.rpartition(".")[2]
        short = short if last.count(short) == 1 else axis
        if isinstance(values, dict):
            axes.append([(axis, str(label), changes, 1) for label, changes in values.items()])
        elif axis == SHARED_BY:
            axes.append([("shared by", str(number), {}, number) for number in values])
        else:
            axes.append([(short, str(value), {axis: value}, 1) for value in values])
    for point in itertools.product(*axes):
        cell = {name: label for name, label, *_ in point}
        changes = {field: value for _, _, each, _ in point for field, value in each.items()}
        yield cell, changes, max((each[3] for each in point), default=1)


def seeded(values: Mapping[str, Any], seed: int, vary: list[str]) -> dict[str, Any]:
    """The fields with explicit seeds of every stage: `seed` where the ablation varies it, else those of the config."""
    found = copy.deepcopy(dict(values))
    for own in found["stages"].values():
        fixed = own.get("seed")
        fixed = found.get("seed", 0) if fixed is None else fixed
        fixed_order = own.get("order_seed")
        kind = own["kind"]
        init = seed if {kind, f"{kind}.init"} & set(vary) else fixed
        order = seed if {kind, f"{kind}.order"} & set(vary) else fixed if fixed_order is None else fixed_order
        own |= {"seed": init, "order_seed": None if order == init else order}
    return found

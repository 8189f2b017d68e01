"""Each stage's folder records the config that the stage was computed from."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from llm3.checkpoints.commit import saved_steps
from llm3.config.changes import Change, changes
from llm3.config.data_schema import SourceConfig, TokenizerConfig
from llm3.config.older import with_new_fields
from llm3.config.schema import EvaluationConfig, GuardConfig, ModelConfig, RunConfig, StageConfig, as_dict
from llm3.errors import UserError, listed
from llm3.files import CHECKPOINTS, RECORD
from llm3.remote import workdir_path
from llm3.stages.amendments import before_amendments
from llm3.stages.records import read_record

# Free fields that are in no record. The others decide what a step costs, or where the report shows the stage.
UNRECORDED = StageConfig.FREE - {"micro_batches", "baseline", "frozen_memory"}
SECTIONS = {
    "model": ModelConfig,
    "tokenizer": TokenizerConfig,
    "sources": dict[str, SourceConfig],
    "evaluations": dict[str, EvaluationConfig],
    "stage": StageConfig,
}


def stage_record(config: RunConfig, name: str) -> dict:
    """The part of the config that decides a stage's result; for a name that is no stage, the part that all share.

    Evaluations are a part only where a stage chooses a step by one of them.
    """
    record = as_dict(config)
    stage = record["stages"].get(name, {})
    shared = {key: record[key] for key in ("seed", "model", "tokenizer")}
    judges = {key: record["evaluations"][key] for key in [judge(stage.get("best", ""), config)] if key}
    if judges:
        shared["evaluations"] = judges
    used = set(tokenizer_sources(config)) | {each["source"] for each in judges.values() if each["source"]}
    shared["sources"] = {key: record["sources"].get(key) for key in sorted(used | _drawn(stage, record["stages"]))}
    free = UNRECORDED if stage.get("patience") else UNRECORDED | StageConfig.VALIDATION
    own = {key: value for key, value in stage.items() if key not in free}
    if own:
        if not own["skip_steps"]:  # newer than digests of records
            del own["skip_steps"]
        own["guard"] = {key: value for key, value in own["guard"].items() if key not in GuardConfig.FREE}
    return json.loads(json.dumps(shared | ({"stage": own} if own else {})))


def judge(best: str, config: RunConfig) -> str | None:
    """The evaluation whose metric a stage's `best` is; None: it has none."""
    names = (name for name in config.evaluations if best.startswith(f"{name}_"))
    return max(names, key=len, default=None)


def of_training(saved: dict, now: dict) -> tuple[dict, dict]:
    """Two records of a stage, each with only those evaluations, and their sources, that both have.

    Other evaluations have no part in training: records of an older version hold all of them, and `best` may change.
    """
    common = saved.get("evaluations", {}).keys() & now.get("evaluations", {}).keys()

    def reduced(record: dict, other: dict) -> dict:
        evaluations = record.get("evaluations", {})
        measured = {own["source"] for name, own in evaluations.items() if name not in common}
        only_measured = measured - other.get("sources", {}).keys()
        sources = {name: own for name, own in record.get("sources", {}).items() if name not in only_measured}
        return record | {"sources": sources, "evaluations": {name: evaluations[name] for name in common}}

    return reduced(saved, now), reduced(now, saved)


def _drawn(stage: dict, stages: dict[str, dict]) -> set[str]:
    """The sources that a stage names, and its parent's if it replays them."""
    if not stage:
        return set()
    start = stage["start"] if isinstance(stage["start"], dict) else {"stage": stage["start"]}
    parent = stages.get(start.get("stage") or "", {}) if stage["replay"] else {}
    return {
        *stage["data"],
        *(name for _, weights in stage["data_schedule"] for name in weights),
        *parent.get("data", ()),
    }


def tokenizer_sources(config: RunConfig) -> list[str]:
    """The sources to train a tokenizer on: `tokenizer.sources`, else the sources of the pretrain stages."""
    if config.tokenizer.path:
        return []
    pretraining = [stage.data for stage in config.stages.values() if stage.kind == "pretrain"]
    return config.tokenizer.sources or sorted({source for data in pretraining for source in data})


def differences(saved: Any, now: Any) -> list[str]:
    """The fields in which two JSON values differ, as lines "field: saved X, now Y"."""
    return [f"  {each.line}" for each in changes(saved, now, None)]


def without_moved_parent(workdir: Path, name: str, saved: dict, now: dict) -> dict:
    """`saved` with the parent's run or model of `now`, if the parent that the stage started from is there.

    A stage that has saved no checkpoint has nothing from the parent that was recorded.
    """
    start, moved = (record.get("stage", {}).get("start") for record in (saved, now))
    if not (isinstance(start, dict) and isinstance(moved, dict)):
        return saved
    if start.get("model") and moved.get("model") and start["model"] != moved["model"]:
        from llm3.handoff.pretrained import same_model

        with suppress(UserError):  # it is not there
            if same_model(workdir, moved, f"config.stages.{name}.start"):
                return saved | {"stage": saved["stage"] | {"start": start | {"model": moved["model"]}}}
        return saved
    if not (start.get("run") and moved.get("run")):
        return saved
    if start["run"] == moved["run"]:
        return saved
    # these import jax, which takes seconds: other differences are reported before
    from llm3.checkpoints.orbax_store import DamagedCheckpoint
    from llm3.checkpoints.stage_checkpoints import Checkpoints
    from llm3.handoff.checkpoint import holds

    run = workdir_path(moved["run"], f"config.stages.{name}.start.run")
    checkpoints = Checkpoints(workdir / name / CHECKPOINTS, read_only=True)
    with suppress(DamagedCheckpoint):
        if (step := checkpoints.latest()) is None or holds(run, checkpoints.meta(step)["parent"]):
            return saved | {"stage": saved["stage"] | {"start": start | {"run": moved["run"]}}}
    return saved


def record_changes(workdir: Path, config: RunConfig, name: str, step: int | None = None) -> list[Change]:
    """The fields in which this config differs from the one that the workdir holds this stage with; not the free ones.

    step: compare with the config without the amendments after this step. A field that llm3 did not have when the stage
    began is no difference while it has its default, and neither is a source that is new.
    """
    saved = read_record(workdir, name)
    if saved is None:
        return []
    now, saved = stage_record(config, name), before_amendments(saved, step)
    for each in (now, saved):
        if "stage" in each:  # a record without it skips none
            each["stage"].setdefault("skip_steps", [])
    now["sources"] = _kept_sources(config, saved, now)
    saved = without_moved_parent(workdir, name, with_new_fields(saved, now, SECTIONS), now)
    return [each for each in changes(*of_training(saved, now), SECTIONS) if each.kind != "free"]


def _kept_sources(config: RunConfig, saved: dict, now: dict) -> dict:
    """The sources of this config that the stage had: data that it drew from before must stay as they are."""
    given = json.loads(json.dumps(as_dict(config)))
    before = {"start": None, "replay": 0.0, "data_schedule": (), "data": ()} | saved.get("stage", {})
    drawn = now["sources"].keys() | _drawn(before, given["stages"])
    return {key: given["sources"].get(key) for key in saved.get("sources", {}) if key in drawn}


def check_record(workdir: Path, config: RunConfig, name: str) -> None:
    """Raise UserError if the workdir holds this stage with a config that differs in more than free fields."""
    if found := record_changes(workdir, config, name):
        raise another_config(workdir, name, found)


def another_config(workdir: Path, name: str, found: list[Change]) -> UserError:
    """The error for a stage that the workdir holds with another config: what differs, and what to do."""
    lines = [f"  {each.line}" for each in found]
    return UserError(
        "\n".join([f"{workdir} holds {name!r} with another config:", *lines, next_step(workdir, name, found)])
    )


def next_step(workdir: Path, name: str, found: list[Change]) -> str:
    """What to do about a stage that differs from the config in these fields."""
    steps = saved_steps(workdir / name / CHECKPOINTS)
    fixed = [each.field for each in found if each.kind == "fixed"]
    saved = workdir / name / RECORD
    mend = f"Nothing was changed. Use another --workdir, or restore the saved values, those of {saved}."
    if not fixed:
        step = steps[-1] if steps else 0
        return f'{mend} Or change the stage from step {step} on: `run` with --amend="why this changes".'
    if not steps:
        return mend
    own = f"stage={name!r}, step={steps[-1]}"
    here = f"start=dict({own}) in a new stage, or " if all(each.startswith("stage.") for each in fixed) else ""
    return (
        f"{mend} {listed(fixed)} cannot change within a stage; to branch from its steps (here are "
        f"{', '.join(map(str, steps))}): {here}start=dict(run={str(workdir)!r}, {own}) in a new --workdir."
    )

"""What a stage of a run was computed from, recorded in its folder: one config for each stage."""

import json
from pathlib import Path
from typing import Any

from llm3.config.schema import RunConfig, as_dict
from llm3.errors import UserError
from llm3.files import RECORD, read_json

# May differ between two starts of one run: they change what is shown and kept, or where it is computed.
FREE_FIELDS = frozenset({"log_every", "save_every", "keep", "best"})


def stage_record(config: RunConfig, name: str) -> dict:
    """The part of the config that decides what a stage computes, or, for the name of none, what all of them share."""
    record = as_dict(config)
    stage = record["stages"].get(name, {})
    shared = {key: record[key] for key in ("seed", "model", "tokenizer", "evaluations")}
    used = set(tokenizer_sources(config)) | {each.source for each in config.evaluations.values()}
    shared["sources"] = {key: record["sources"].get(key) for key in sorted(used | _drawn(stage, record["stages"]))}
    own = {key: value for key, value in stage.items() if key not in FREE_FIELDS}
    return json.loads(json.dumps(shared | ({"stage": own} if own else {})))


def _drawn(stage: dict, stages: dict[str, dict]) -> set[str]:
    """The sources of a stage's record: those that it names, and its parent's where it replays them."""
    if not stage:
        return set()
    start = stage["start"] if isinstance(stage["start"], dict) else {"stage": stage["start"]}
    parent = stages.get(start["stage"], {}) if stage["replay"] else {}
    return {
        *stage["data"],
        *(name for _, weights in stage["data_schedule"] for name in weights),
        *parent.get("data", ()),
    }


def tokenizer_sources(config: RunConfig) -> list[str]:
    """The sources that a new tokenizer is trained on: those the config names, else those of the pretrain stages."""
    if config.tokenizer.path:
        return []
    pretraining = [stage.data for stage in config.stages.values() if stage.kind == "pretrain"]
    return config.tokenizer.sources or sorted({source for data in pretraining for source in data})


def differences(before: Any, now: Any, where: str = "") -> list[str]:
    """Where two JSON values differ: "field: before -> now"."""
    if isinstance(before, dict) and isinstance(now, dict):
        lines = []
        for key in sorted(before.keys() | now.keys()):
            lines += differences(before.get(key), now.get(key), f"{where}.{key}" if where else key)
        return lines
    return [] if before == now else [f"  {where}: {before!r} there, {now!r} now"]


def check_record(workdir: Path, config: RunConfig, name: str) -> None:
    """Raise UserError where the workdir holds this stage of another config."""
    before = read_json(workdir / name / RECORD)
    if before is None:
        return
    if lines := differences(before, stage_record(config, name)):
        raise UserError(
            f"{workdir} holds {name!r} of another config:\n" + "\n".join(lines) + "\n"
            "Nothing was changed. Use another --workdir, or go back to the values there."
        )

"""The parent that each stage of a config names, and where the first of them comes from."""

import re
from pathlib import Path

from llm3.config.schema import RunConfig, StageConfig
from llm3.errors import UserError
from llm3.files import INIT, RESERVED, START
from llm3.handoff.start import ModelStart, Start, read_start


def parent_name(stage: StageConfig) -> str | None:
    """The stage of the same run that this one starts from, if any."""
    if isinstance(stage.start, dict):
        return None if stage.start.get("run") else stage.start.get("stage")
    return stage.start


def parent_labels(config: RunConfig, workdir: Path) -> dict[str, str]:
    """{stage: the row of its parent}: "init", "start", a stage of the same run, or a row of `other_runs`."""
    rows = {
        (start.run.resolve(), start.stage, start.step): row for row, (_, start) in other_runs(config, workdir).items()
    }

    def label(name: str, stage: StageConfig) -> str:
        start = read_start(stage.start, workdir, f"config.stages.{name}.start")
        if isinstance(start, ModelStart):
            return START
        return INIT if start is None else rows.get((start.run.resolve(), start.stage, start.step), start.stage)

    return {name: label(name, stage) for name, stage in config.stages.items()}


def other_runs(config: RunConfig, workdir: Path) -> dict[str, tuple[str, Start]]:
    """{row: (the first stage that starts from it, its start)} of the stages of other runs that this run starts from.

    A row has the name of the run's folder and of the stage, as in "base-pretrain", and of the step if the config names
    one. Where that is taken, the folder above is put in front.
    """
    rows: dict[str, tuple[str, Start]] = {}
    seen, taken = set(), {*config.stages, *RESERVED}
    for name, stage in config.stages.items():
        start = read_start(stage.start, workdir, f"config.stages.{name}.start")
        if not isinstance(start, Start) or (run := start.run.resolve()) == workdir.resolve():
            continue
        if (key := (run, start.stage, start.step)) in seen:
            continue
        seen.add(key)
        parts = [start.stage] + ([] if start.step == "latest" else [str(start.step)])
        for folder in (run, *run.parents):
            parts.insert(0, folder.name)
            row = re.sub(r"[^\w.-]+", "_", "-".join(parts)).lstrip(".-")
            if row not in taken and row not in rows:
                break
        rows[row] = (name, start)
    return rows


def model_starts(config: RunConfig) -> dict[str, ModelStart]:
    """The stages that start from a pretrained model, which must be the same. Raises UserError."""
    read = {
        name: read_start(stage.start, Path(), f"config.stages.{name}.start") for name, stage in config.stages.items()
    }
    found = {name: start for name, start in read.items() if isinstance(start, ModelStart)}
    for name, start in found.items():
        first, other = next(iter(found.items()))
        if (start.model, start.revision) != (other.model, other.revision):
            raise UserError(
                f"config.stages.{name}.start: model={start.model!r}, revision={start.revision!r}, but stage {first!r} "
                f"has model={other.model!r}, revision={other.revision!r}: expected one model in a run"
            )
    return found


def first_rows(config: RunConfig, workdir: Path) -> list[str]:
    """The rows that are measured before anything trains: of all that stages start from and that is no stage here.

    These are the pretrained model, stages of other runs, and the untrained model.
    """
    untrained = INIT in parent_labels(config, workdir).values()
    return [*[START] * bool(model_starts(config)), *other_runs(config, workdir), *[INIT] * untrained]


def origin(config: RunConfig, workdir: Path = Path()) -> tuple[str, Start | ModelStart] | None:
    """The model, or else the stage of another run, that a stage of this run starts from, with its name."""
    for name, found in model_starts(config).items():
        return name, found
    if any(stage.kind == "pretrain" for stage in config.stages.values()):
        return None
    for name, stage in config.stages.items():
        if isinstance(stage.start, dict) and stage.start.get("run"):
            start = read_start(stage.start, workdir, f"config.stages.{name}.start")
            assert isinstance(start, Start)
            return name, start
    return None

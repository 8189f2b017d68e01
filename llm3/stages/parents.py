"""The parent that each stage of a config names, and where the first of them comes from."""

from pathlib import Path

from llm3.config.schema import RunConfig, StageConfig
from llm3.errors import UserError
from llm3.files import INIT, START
from llm3.handoff.start import ModelStart, Start, read_start


def parent_name(stage: StageConfig) -> str | None:
    """The stage of the same run that this one starts from, if any."""
    if isinstance(stage.start, dict):
        return None if stage.start.get("run") else stage.start.get("stage")
    return stage.start


def parent_label(stage: StageConfig) -> str:
    """The name of a stage's parent: "init", "start", a stage of the same run, or RUN/STAGE."""
    if isinstance(stage.start, dict) and "model" in stage.start:
        return START
    if isinstance(stage.start, dict) and stage.start.get("run"):
        return f"{stage.start['run']}/{stage.start['stage']}"
    return parent_name(stage) or INIT


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


def first_rows(config: RunConfig) -> list[str]:
    """The rows that are measured before anything trains: of the pretrained model, of the untrained one, or of both."""
    if not model_starts(config):
        return [INIT]
    untrained = any(parent_label(stage) == INIT for stage in config.stages.values())
    return [START, *[INIT] * untrained]


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

"""The verb `report`: writes report.md again from the files of a run, without devices; `run` ends with it."""

from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console

from llm3.config import load
from llm3.config.schema import RunConfig, StageConfig
from llm3.errors import UserError, writing
from llm3.files import DETAILS, REPORT, RESOLVED, ROW, SAMPLES, SESSIONS, read_json
from llm3.report import page, table
from llm3.report.console import new_console
from llm3.report.cost import with_full_step_seconds
from llm3.report.logs import read_json_lines, read_metrics
from llm3.report.material import Columns, Material
from llm3.report.predictions import read_predictions
from llm3.report.settings import changed
from llm3.stages import rules
from llm3.stages.evaluated import current, definition
from llm3.stages.parents import first_rows, parent_labels


def report(workdir: Path, config: RunConfig | None = None) -> int:
    """Print the matrix of the finished stages of a run, and write report.md, matrix.json and the plots again.

    config: None for the one that `run` keeps. Raises UserError for a directory without a finished stage or config.
    """
    write_report(config or kept_config(workdir), workdir, new_console(soft_wrap=True))
    return 0


def kept_config(workdir: Path) -> RunConfig:
    """The config of the last session of a run, as `run` keeps it. Raises UserError."""
    given = read_json(workdir / RESOLVED)
    if given is None:
        raise UserError(f"{workdir / RESOLVED} does not exist: write it with `run`, or give `report` a --config=FILE")
    return load.read(given)


def write_report(config: RunConfig, workdir: Path, console: Console) -> None:
    """Print the matrix of all finished stages, and write it with report.md and the plots. Raises UserError."""
    material = gather(config, workdir)
    table.print_table(material.given_rows, material.given_baselines, console)
    with writing(workdir / REPORT):
        page.write_report(workdir, material)
    console.print(f"Report: {workdir / REPORT}")


def gather(config: RunConfig, workdir: Path) -> Material:
    """Everything that the report shows, from the files of a run. Raises UserError if no stage is finished."""
    first, parents = first_rows(config, workdir), parent_labels(config, workdir)
    now = {name: {"config": definition(config, name)} for name in config.evaluations}
    found: dict[str, dict] = {}
    details: dict[str, dict | None] = {}
    for name in [*first, *rules.check(config)]:
        if row := read_json(workdir / name / ROW):
            kept, details[name] = current(workdir / name, row, read_json(workdir / name / DETAILS), now)
            found[name] = kept | {"parent": parents.get(name)}
    if not found:
        raise UserError(f"{workdir} holds no finished stage yet; rerun `run` to finish one")
    shapes = {name: step_shape(stage) for name, stage in config.stages.items()}
    full = {name for name, stage in config.stages.items() if rules.trains_all(stage) and not stage.adapters}
    timed = with_full_step_seconds(list(found.values()), shapes, full)
    aside = {name for name, stage in config.stages.items() if stage.baseline}
    sessions: list[dict[str, Any]] = read_json(workdir / SESSIONS) or []
    last: dict[str, Any] = sessions[-1] if sessions else {"command": "", "facts": {}, "environment": {}}

    @cache
    def predictions(stage: str, evaluation: str) -> Columns | None:
        return read_predictions(workdir / stage, evaluation)

    return Material(
        [row for row in timed if row["stage"] not in aside],
        [row for row in timed if row["stage"] in aside],
        title=f"Run {workdir.resolve().name}",
        command=last["command"],
        histories={name: read_metrics(workdir / name) for name in found if name not in first},
        facts=last["facts"] | last["environment"] | commits(sessions),
        details=details,
        predictions=predictions,
        samples={name: lines for name in found if (lines := read_json_lines(workdir / name / SAMPLES))},
        settings=changed(config),
        wall_seconds=summed([each["wall_seconds"] for each in sessions]),
        sessions=[(each["started"], each["seconds"]) for each in sessions],
    )


def commits(sessions: list[dict]) -> dict[str, str]:
    """All commits of llm3 that worked on a run, if there is more than one."""
    found = dict.fromkeys(each["environment"]["commit"] for each in sessions)
    return {"earlier commits": ", ".join(list(found)[:-1])} if len(found) > 1 else {}


def summed(parts: list[dict[str, float]]) -> dict[str, float]:
    """{part: seconds} of several sessions together."""
    names = dict.fromkeys(name for each in parts for name in each)
    return {name: sum(each.get(name, 0.0) for each in parts) for name in names}


def step_shape(stage: StageConfig) -> tuple:
    """The fields that decide the cost of a step, besides the trainable parameters."""
    return (stage.batch_size, stage.sequence_length, str(stage.objective), stage.micro_batches, stage.data)

"""The verb `report`: the report of a run from its files, without devices, or of several runs; `run` ends with it."""

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console

from llm3.config import load
from llm3.config.schema import RunConfig, StageConfig, as_dict
from llm3.distributed.lock import shared
from llm3.errors import UserError, writing
from llm3.files import (
    DATA_SAMPLE,
    DETAILS,
    PLAN,
    REPORT,
    REPORT_HTML,
    RESOLVED,
    ROW,
    SAMPLES,
    SESSIONS,
    TOKENIZER,
    read_json,
)
from llm3.report import page, side_by_side, table
from llm3.report.console import new_console
from llm3.report.cost import with_full_step_seconds
from llm3.report.html import write_page
from llm3.report.logs import read_json_lines, read_metrics
from llm3.report.material import Columns, Material
from llm3.report.predictions import read_predictions
from llm3.report.settings import changed
from llm3.stages import rules
from llm3.stages.beside import with_stages_beside
from llm3.stages.evaluated import current, definition
from llm3.stages.parents import first_rows, parent_labels


def report(dirs: list[Path], config: RunConfig | None = None, out: Path | None = None) -> int:
    """Write the report of a run again and print its matrix or, of several runs, write one that compares them.

    config: None for the one that `run` keeps. out: for the report of several runs. Raises UserError for a directory
    without a finished stage or config.
    """
    console = new_console(soft_wrap=True)
    if len(dirs) == 1:
        write_report_of(dirs[0], config, console)
    elif out is not None:
        write_side_by_side(dirs, out, console)
    return 0


def write_report_of(directory: Path, config: RunConfig | None, console: Console) -> None:
    """Write the report of a directory again; each kind of directory has its own report. Raises UserError."""
    if (directory / PLAN).is_file():
        from llm3.ablation import report as ablation_report  # with jax, which takes seconds to import
        from llm3.ablation.terminal import print_summary

        print_summary(ablation_report.write_report(directory), console)
        return
    write_report(config or kept_config(directory), directory, console)


def write_side_by_side(runs: list[Path], out: Path, console: Console) -> None:
    """Write a report that compares the runs with the first of them. Raises UserError."""
    configs = [kept_config(run) for run in runs]
    names = [run.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run) for run in runs]
    compared = [
        side_by_side.Run(name, gather(config, run), as_dict(config), surroundings(run))
        for name, config, run in zip(names, configs, runs, strict=True)
    ]
    text, figures = side_by_side.page(compared)
    with writing(out / REPORT_HTML):
        write_page(out, side_by_side.title(compared), text, figures)
    console.print(f"Report: {out / REPORT_HTML}, and {REPORT} beside it")


def surroundings(run: Path) -> dict[str, Any]:
    """The tokenizer of a run, and the commit, the versions and the devices of its last session."""
    sessions = read_json(run / SESSIONS) or [{"facts": {}, "environment": {}}]
    facts, environment = sessions[-1]["facts"], sessions[-1]["environment"]
    path = run / TOKENIZER
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.is_file() else None
    return {"tokenizer": digest, **environment, **{name: facts.get(name) for name in ("devices", "compute dtype")}}


def kept_config(workdir: Path) -> RunConfig:
    """The config of the last session of a run, as `run` keeps it. Raises UserError."""
    given = read_json(workdir / RESOLVED)
    if given is None:
        raise UserError(f"{workdir / RESOLVED} does not exist: write it with `run`, or give `report` a --config=FILE")
    return load.read(given)


def write_report(config: RunConfig, workdir: Path, console: Console) -> None:
    """Print the matrix of all finished stages, and write it with report.md and the plots. Raises UserError.

    Of several runs that end at once, one after the other writes what all of them have finished by then.
    """
    with shared(workdir):
        material = gather(config, workdir)
        table.print_table(material.given_rows, material.given_baselines, console)
        with writing(workdir / REPORT_HTML):
            page.write_report(workdir, material)
    console.print(f"Report: {workdir / REPORT_HTML}, and {REPORT} beside it")


def gather(config: RunConfig, workdir: Path) -> Material:
    """Everything that the report shows, from the files of a run. Raises UserError if no stage is finished."""
    rules.check(config)
    settings, config = changed(config), with_stages_beside(config, workdir)
    first, parents = first_rows(config, workdir), parent_labels(config, workdir)
    now = {name: {"config": definition(config, name)} for name in config.evaluations}
    found: dict[str, dict] = {}
    details: dict[str, dict | None] = {}
    for name in [*first, *rules.parents_first(config.stages)]:
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
        command="\n".join(dict.fromkeys(each["command"] for each in sessions)),
        histories={name: read_metrics(workdir / name) for name in found if name not in first},
        facts=last["facts"] | last["environment"] | commits(sessions),
        details=details,
        predictions=predictions,
        samples={name: lines for name in found if (lines := read_json_lines(workdir / name / SAMPLES))},
        data_samples={name: kept for name in found if (kept := read_json(workdir / name / DATA_SAMPLE))},
        settings=settings,
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

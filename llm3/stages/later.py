"""Evaluations that are added to a config, or changed, after a stage is finished: run on its last checkpoint."""

import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from llm3.checkpoints.load import load_stage
from llm3.config.schema import RunConfig
from llm3.distributed import processes
from llm3.errors import UserError
from llm3.files import DETAILS, ROW, read_json
from llm3.stages.evaluate import Measured, digest_of, measure, write_results
from llm3.stages.evaluated import Entries, changes, definition, entries, majority, owner, without
from llm3.stages.evaluation import Subject, subject_of_checkpoint
from llm3.stages.experiment import read_evaluation_data, read_library
from llm3.stages.first_rows import subject_and_params, unreadable
from llm3.stages.locks import row_held
from llm3.stages.parents import first_rows
from llm3.stages.session import Session
from llm3.stages.trackers import open_writer


def outdated(workdir: Path, names: list[str], now: Entries) -> dict[str, dict[str, list[str]]]:
    """{row: {evaluation to run for it: what has changed, [] if the row lacks it}} of the rows that exist.

    now: the entries of this config, without "data" where that is not known.
    """
    found = {}
    for name in names:
        if row := read_json(workdir / name / ROW):
            saved = entries(workdir / name, row)
            lines = {each: changes(saved.get(each), own) for each, own in now.items()}
            if wanted := {each: why for each, why in lines.items() if why is not None}:
                found[name] = wanted
    return found


def is_current(config: RunConfig, workdir: Path, names: list[str]) -> bool:
    """Whether no row lacks an evaluation of this config, as far as that can be run.

    Data that cannot be read counts as unchanged, and the row of a parent that is not there any more stays as it is.
    """
    first = first_rows(config, workdir)
    names = [name for name in names if name not in first or not unreadable(config, workdir, name)]
    now: Entries = {name: {"config": definition(config, name)} for name in config.evaluations}
    if outdated(workdir, names, now):
        return False
    with suppress(UserError):
        for name, fingerprint in read_evaluation_data(config, read_library(config, workdir)).items():
            now[name] |= {"data": fingerprint}
    return not outdated(workdir, names, now)


def evaluate_outdated(session: Session, first: list[str], stages: list[str]) -> None:
    """Bring the rows that exist up to date with the evaluations of the config. Nothing else of a stage is touched.

    first: rows of parents that are no stage here. Raises UserError.
    """
    now, where = session.experiment.evaluation_entries, (session.config, session.workdir)

    def look(names: list[str]) -> dict[str, dict[str, list[str]]]:
        return processes.broadcast_from_first(lambda: outdated(session.workdir, names, now))

    for name, wanted in look([*first, *stages]).items():
        if name in first and (lost := processes.broadcast_from_first(partial(unreadable, *where, name))):
            session.console.print(f"{name}: not evaluated by {', '.join(wanted)}, since it cannot be read: {lost}")
            continue
        with row_held(session.workdir, name, session.watchdog):
            wanted = look([name]).get(name, {})  # another run may have done so meanwhile
            for evaluation, lines in wanted.items():
                why = f"again, since it has changed: {'; '.join(lines)}" if lines else "which its row lacks"
                session.console.print(f"{name}: evaluating {evaluation}, {why}")
            if wanted:
                subject, params = subject_and_params(session, name) if name in first else finished_stage(session, name)
                _update(session, subject, params, list(wanted))


def finished_stage(session: Session, name: str) -> tuple[Subject, dict]:
    """A finished stage and its canonical parameters, from its last checkpoint."""
    params, model, meta = load_stage(session.workdir, name, mesh=session.mesh)
    model = replace(model, compute_dtype=session.experiment.compute_dtype, max_output_positions=0)
    return subject_of_checkpoint(name, model, meta), params


def _update(session: Session, subject: Subject, params: dict, wanted: list[str]) -> None:
    directory, started = session.workdir / subject.name, time.perf_counter()
    digest = processes.broadcast_from_first(lambda: read_json(directory / ROW)["params_digest"])
    if (own := digest_of(params)) != digest != digest_of(params, format=1):  # the row may be an old one
        raise UserError(
            f"{directory / ROW} is of other parameters ({digest[:12]}) than there are now ({own[:12]}): move it away "
            f"to run all evaluations again, or use another --workdir"
        )
    found = Measured({}, {}, {})
    for evaluation in session.experiment.evaluations:
        if evaluation.name in wanted:
            found.add(measure(session, subject, params, evaluation))
    seconds = time.perf_counter() - started
    processes.broadcast_from_first(lambda: _write(session, directory, found, wanted, seconds))


def _write(session: Session, directory: Path, found: Measured, wanted: list[str], seconds: float) -> None:
    row: dict[str, Any] = read_json(directory / ROW)
    saved, now = entries(directory, row), session.experiment.evaluation_entries
    known = [*saved, *now]
    details = without(read_json(directory / DETAILS) or {}, wanted, known) | found.details
    row = without(row, wanted, known) | found.metrics
    shown = {key: value for key, value in row.items() if owner(key, known) in now}
    spent: dict[str, float] = row.get("wall_seconds", {})
    row |= {
        "majority_accuracy": majority(shown),
        "evaluation_seconds": row.get("evaluation_seconds", 0.0) + seconds,
        "wall_seconds": spent | {"evaluate": spent.get("evaluate", 0.0) + seconds},
        "evaluations": saved | {name: now[name] for name in wanted},
    }
    if directory.name in session.config.stages:
        say = session.console.print
        with open_writer(session.config, session.workdir, directory.name, row["steps"], say) as writer:
            writer.result(row["steps"], row)
    write_results(directory, row, details, found.predictions)

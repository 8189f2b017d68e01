"""The rows that are measured before anything trains: of the parents that are no stage of the run."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from llm3.config.schema import RunConfig
from llm3.distributed import processes
from llm3.errors import UserError
from llm3.files import INIT, RECORD, ROW, START, read_json
from llm3.handoff.checkpoint import Checkpoint, find_checkpoint
from llm3.handoff.pretrained import Pretrained, find_pretrained, keep_description
from llm3.models.transformer import abstract_params, init
from llm3.stages.evaluate import write_row
from llm3.stages.evaluation import Subject, subject_of_checkpoint
from llm3.stages.locks import row_held
from llm3.stages.model import has_lm_leaves
from llm3.stages.parents import first_rows, model_starts, other_runs
from llm3.stages.records import write_record
from llm3.stages.samples import take_samples
from llm3.stages.session import Session
from llm3.stages.start import loaded_params
from llm3.stages.workdir import check_record, stage_record
from llm3.tree import flatten

NO_COST = {"tokens": 0, "flops": 0.0, "seconds": 0.0, "trainable_params": 0}
FromOutside = TypeVar("FromOutside", Checkpoint, Pretrained)


def evaluate_first_rows(session: Session) -> None:
    """Write the rows of all that stages start from and that is no stage here, unless they exist. Raises UserError.

    A stage of another run that is not there any more has no row; the stages that began with it need it no more.
    """
    for name in first_rows(session.config, session.workdir):
        if _is_measured(session, name):
            continue
        if lost := processes.broadcast_from_first(partial(unreadable, session.config, session.workdir, name)):
            session.console.print(f"{name}: no row, since the parent cannot be read: {lost}")
            continue
        with row_held(session.workdir, name, session.watchdog):
            if not _is_measured(session, name):  # by another run, meanwhile
                subject, params = subject_and_params(session, name)
                take_samples(session, subject, params, step=0)
                write_row(session, subject, params, _facts(session, name))


def write_records(session: Session) -> None:
    """Write down the config that each of the first rows is computed from, unless that has been done.

    Raises UserError if another run has begun them with another config since that was checked.
    """
    for name in first_rows(session.config, session.workdir):
        check_record(session.workdir, session.config, name)
        if not (session.workdir / name / RECORD).is_file():
            write_record(session.workdir, name, stage_record(session.config, name))


def unreadable(config: RunConfig, workdir: Path, name: str) -> str:
    """Why what a first row is measured on cannot be read; "" if it can."""
    models, others = model_starts(config), other_runs(config, workdir)
    try:
        if name == START:
            stage, model = next(iter(models.items()))
            find_pretrained(model, workdir, f"config.stages.{stage}.start")
        elif name in others:
            stage, start = others[name]
            find_checkpoint(start, f"config.stages.{stage}.start")
    except UserError as error:
        return str(error)
    return ""


def keep_model(session: Session) -> None:
    """Write down which model the run starts from, if it does and has not been. Raises UserError."""
    for name, start in model_starts(session.config).items():
        if not _is_measured(session, START):
            keep_description(find_pretrained(start, session.workdir, f"config.stages.{name}.start"), session.workdir)
        return


def subject_and_params(session: Session, name: str) -> tuple[Subject, dict]:
    """What a first row is measured on, and its canonical parameters. Raises UserError."""
    if name == INIT:
        model = session.experiment.init_model
        return Subject(INIT, model), init(model, session.experiment.init_seed, session.mesh)
    return _pretrained(session) if name == START else _other_run(session, name)


def _is_measured(session: Session, name: str) -> bool:
    """Whether there is the row; of a stage of another run, whether it is of what that stage is now."""
    others = other_runs(session.config, session.workdir)

    def look() -> bool:
        row = read_json(session.workdir / name / ROW)
        if not row or name not in others or unreadable(session.config, session.workdir, name):
            return bool(row)
        parent = find_checkpoint(others[name][1], f"config.stages.{others[name][0]}.start")
        return row["origin"]["params_digest"] == parent.meta["params_digest"]

    return processes.broadcast_from_first(look)


def _pretrained(session: Session) -> tuple[Subject, dict]:
    """The model as it is, and its task head if it has one. What it lacks is initialized, and not evaluated."""
    name, start = next(iter(model_starts(session.config).items()))
    where = f"config.stages.{name}.start"
    parent = find_pretrained(start, session.workdir, where)
    model = replace(session.experiment.init_model, classes=len(parent.labels))
    abstract = abstract_params(model, session.mesh)
    params, account = loaded_params(
        session, with_all_leaves(parent, flatten(abstract)), abstract, model, session.experiment.init_seed, where
    )
    has_head = parent.labels and not any(path.startswith("head/") for path in account.fresh)
    subject = Subject(START, model, has_lm_leaves(parent.leaves, model), "labels" if has_head else "", parent.labels)
    return subject, params


def _other_run(session: Session, name: str) -> tuple[Subject, dict]:
    """A stage of another run with its own model, head and adapters, and the vocabulary of this run."""
    stage, start = other_runs(session.config, session.workdir)[name]
    where, own = f"config.stages.{stage}.start", session.experiment.init_model
    parent = find_checkpoint(start, where)
    model = replace(
        parent.model,
        vocab_size=own.vocab_size,
        vocab_multiple=own.vocab_multiple,
        compute_dtype=own.compute_dtype,
        max_output_positions=0,
    )
    abstract = abstract_params(model, session.mesh)
    params, _ = loaded_params(
        session, with_all_leaves(parent, flatten(abstract)), abstract, model, session.experiment.init_seed, where
    )
    return subject_of_checkpoint(name, model, parent.meta), params


def _facts(session: Session, name: str) -> dict[str, Any]:
    """The keys of a first row besides metrics. That of a stage of another run has the cost of its chain there."""
    others = other_runs(session.config, session.workdir)
    if name not in others:
        return NO_COST | {"parent": None}
    stage, start = others[name]
    parent = find_checkpoint(start, f"config.stages.{stage}.start")
    chain = [link.get("cost") or {} for link in parent.lineage(session.workdir)]
    cost = {key: sum(each.get(key) or 0 for each in chain) for key in ("tokens", "flops", "seconds")}
    return cost | {"parent": None, "origin": parent.describe(session.workdir)}


def with_all_leaves(parent: FromOutside, model: dict) -> FromOutside:
    """The parent with a start that names every leaf that only it, or only the model, has."""
    fresh = tuple(re.escape(path) for path in model if path not in parent.leaves)
    drop = tuple(re.escape(path) for path in parent.leaves if path not in model)
    return parent._replace(start=parent.start._replace(fresh=fresh, drop=drop))

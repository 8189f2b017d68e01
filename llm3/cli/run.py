"""The verb `run`: train and evaluate the stages in order, then write a report."""

import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from rich.console import Console

from llm3.checkpoints.stage_checkpoints import Checkpoints
from llm3.config.schema import RunConfig, StageConfig
from llm3.distributed import processes
from llm3.distributed.lock import lock
from llm3.distributed.preemption import stop_on_signals
from llm3.errors import FULL, NotWritten, UserError, writing
from llm3.files import (
    CHAT_TEMPLATE,
    CHECKPOINTS,
    DETAILS,
    MATRIX,
    REPORT,
    ROW,
    TOKENIZER,
    read_json,
    write_atomic,
)
from llm3.planning.fit import check_fits
from llm3.report import page, table
from llm3.report.console import new_console
from llm3.report.logs import read_metrics
from llm3.stages import rules
from llm3.stages.cost import with_full_step_seconds
from llm3.stages.evaluated import Entries, current
from llm3.stages.experiment import prepare
from llm3.stages.first_rows import evaluate_first_rows, keep_model, unreadable, write_records
from llm3.stages.later import evaluate_outdated, is_current
from llm3.stages.parents import first_rows, parent_labels
from llm3.stages.run_stage import check_all_before_training, run_stage
from llm3.stages.session import Session
from llm3.stages.start import check_ancestry, locate_parent
from llm3.stages.workdir import check_record


def run(config: RunConfig, workdir: Path, stages: list[str] | None = None) -> int:
    """Train and evaluate the chosen stages (default: all), resuming unfinished ones; returns the exit status.

    Raises UserError for a run that cannot start, and NotWritten, with the newest intact checkpoint, if a write fails.
    """
    console = make_console()
    order = rules.chosen(config, stages)
    first = first_rows(config, workdir)
    for name in [*first, *order]:
        check_record(workdir, config, name)
    check_ancestry(workdir, order)
    to_train = processes.broadcast_from_first(lambda: [name for name in order if not (workdir / name / ROW).is_file()])
    for name in to_train:
        locate_parent(config, workdir, name, to_train)
    if not to_train and processes.broadcast_from_first(lambda: is_complete(config, workdir, order)):
        finished = "is finished" if len(order) == 1 else "are finished"
        console.print(f"Nothing left to do: {', '.join(order)} {finished}. See {workdir / REPORT}")
        return 0
    check_fits(
        config, [name for name in to_train if not Checkpoints(workdir / name / CHECKPOINTS, read_only=True).steps()]
    )
    with ExitStack() as held:
        held.enter_context(naming_intact_checkpoint(workdir, order))
        processes.broadcast_from_first(lambda: held.enter_context(lock(workdir)))
        experiment = processes.on_first_then_all(lambda: prepare(config, workdir, order))
        session = Session(experiment, console)
        request = held.enter_context(stop_on_signals())
        with session.on_mesh():
            begin(session, to_train)
            evaluate_outdated(session, first, [name for name in order if name not in to_train])
            for stage in (experiment.stages[name] for name in to_train):
                if request.signal or not run_stage(stage, session, request):
                    signal = f"Stopped by signal {request.signal}"
                    console.print(f"{signal}; everything is saved. Rerun the command to resume.")
                    return request.exit
        check_ancestry(workdir, order)
        if processes.is_first():
            report(config, workdir, session.facts(), console, experiment.evaluation_entries)
    return 0


@contextmanager
def naming_intact_checkpoint(workdir: Path, order: list[str]) -> Iterator[None]:
    """Add the newest intact checkpoint to a NotWritten error."""
    try:
        with writing(f"a file in {workdir}, or of the cache,", *FULL):
            yield
    except NotWritten as error:
        raise NotWritten(f"{error}; {intact_checkpoint(workdir, order)} once the disk accepts writes") from error


def intact_checkpoint(workdir: Path, order: list[str]) -> str:
    """A phrase on where a run would resume: the newest readable checkpoint of the last stage that has one."""
    for name in reversed(order):
        checkpoints = Checkpoints(workdir / name / CHECKPOINTS, read_only=True)
        for step in reversed(checkpoints.steps()):
            with suppress(UserError):
                if processes.count() == 1:  # several processes can only read together, and the others may not be here
                    checkpoints.leaves(step)
                return f"checkpoint {step} of {name} is intact; rerun the command to resume"
    return "there is no earlier checkpoint; rerun the command to start again"


def begin(session: Session, to_train: list[str]) -> None:
    """Check all stages to train, then write the files of the run and evaluate the model that it begins with."""
    check_all_before_training(session, to_train)
    keep_model(session)
    if processes.is_first():
        write_records(session)
        with writing(session.workdir / TOKENIZER):
            session.experiment.tokenizer.save(session.workdir / TOKENIZER)
        if template := session.experiment.library.template:
            with writing(session.workdir / CHAT_TEMPLATE):
                write_atomic(session.workdir / CHAT_TEMPLATE, template)
        session.print_header()
    evaluate_first_rows(session)


def make_console() -> Console:
    """A console that is silent on all processes but the first."""
    return new_console(soft_wrap=True, quiet=not processes.is_first())


def is_complete(config: RunConfig, workdir: Path, order: list[str]) -> bool:
    """Whether these stages and the rows before them are in the report, with all evaluations of the config."""
    first = [
        name
        for name in first_rows(config, workdir)
        if (workdir / name / ROW).is_file() or not unreadable(config, workdir, name)
    ]
    return is_reported(workdir, [*first, *order]) and is_current(config, workdir, [*first, *order])


def is_reported(workdir: Path, names: list[str]) -> bool:
    """Whether there is a report with these rows."""
    matrix = read_json(workdir / MATRIX) or {"rows": [], "baselines": []}
    reported = {row["stage"] for row in matrix["rows"] + matrix["baselines"]}
    return reported.issuperset(names) and (workdir / REPORT).is_file()


def step_shape(stage: StageConfig) -> tuple:
    """The fields that decide the cost of a step, besides the trainable parameters."""
    return (stage.batch_size, stage.sequence_length, str(stage.objective), stage.micro_batches, stage.data)


def report(config: RunConfig, workdir: Path, facts: dict, console: Console, evaluations: Entries) -> None:
    """Print the matrix of all finished stages, and write it with report.md and the plots.

    evaluations: those of the config, which are shown.
    """
    rows: list[dict] = []
    baselines: list[dict] = []
    histories: dict[str, list[dict]] = {}
    details: dict[str, dict | None] = {}
    first, parents = first_rows(config, workdir), parent_labels(config, workdir)
    for name in [*first, *rules.check(config)]:
        row = read_json(workdir / name / ROW)
        if row is None:
            continue
        row, details[name] = current(workdir / name, row, read_json(workdir / name / DETAILS), evaluations)
        row["parent"] = parents.get(name)
        baseline = name not in first and config.stages[name].baseline
        (baselines if baseline else rows).append(row)
        if name not in first:
            histories[name] = read_metrics(workdir / name)
    shapes = {name: step_shape(stage) for name, stage in config.stages.items()}
    full = {name for name, stage in config.stages.items() if rules.trains_all(stage) and not stage.adapters}
    timed = with_full_step_seconds(rows + baselines, shapes, full)
    rows, baselines = timed[: len(rows)], timed[len(rows) :]
    table.print_table(rows, baselines, console)
    command = shlex.join(["python", "-m", "llm3", *sys.argv[1:]])
    title = f"Run {workdir.name}"
    with writing(workdir / REPORT):
        page.write_report(
            workdir, rows, baselines, histories, title=title, command=command, facts=facts, details=details
        )
    console.print(f"Report: {workdir / REPORT}")

"""The verb `run`: train and evaluate the stages in order, then write a report."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from llm3.checkpoints.stage_checkpoints import Checkpoints
from llm3.cli.report import write_report
from llm3.config.schema import RunConfig, as_dict
from llm3.data.tokenizer import Tokenizer
from llm3.distributed import processes
from llm3.distributed.agreement import check_shared
from llm3.distributed.bucket_lock import bucket_held
from llm3.distributed.lock import shared
from llm3.distributed.preemption import stop_on_signals
from llm3.errors import FULL, NotWritten, UserError, writing
from llm3.files import (
    CHAT_TEMPLATE,
    CHECKPOINTS,
    MATRIX,
    REPORT_HTML,
    RESOLVED,
    ROW,
    TOKENIZER,
    read_json,
    write_atomic,
    write_json,
)
from llm3.planning.fit import check_fits
from llm3.report.console import WARNING, new_console
from llm3.stages import agreement, rules
from llm3.stages.amend import Amendment, apply, check_children, planned, stage_to_go_back
from llm3.stages.ancestry import changed_parent, check_ancestry
from llm3.stages.environment import SessionLog
from llm3.stages.experiment import prepare
from llm3.stages.first_rows import evaluate_first_rows, keep_model, unreadable, write_records
from llm3.stages.later import evaluate_outdated, is_current
from llm3.stages.locks import StageLocks, check_parents
from llm3.stages.mend import mend
from llm3.stages.parents import first_rows
from llm3.stages.run_stage import check_all_before_training, run_stage
from llm3.stages.session import Session
from llm3.stages.start import locate_parent
from llm3.stages.stopwatch import Stopwatch
from llm3.stages.workdir import check_record


class Work(NamedTuple):
    """What a run is to do: how stages that have begun change, by name, and the stages to train, parents first."""

    amendments: dict[str, Amendment]
    to_train: list[str]


def run(
    config: RunConfig,
    workdir: Path,
    stages: list[str] | None = None,
    bare: bool = False,
    why: str = "",
    from_step: int | None = None,
) -> int:
    """Train and evaluate the chosen stages (default: all), resuming unfinished ones; returns the exit status.

    bare: measure nothing but these stages, and write no report. why: the reason for a config that differs from that of
    stages that have begun, from where they resume. from_step: an earlier step to resume from.
    Raises UserError for a run that cannot start, and NotWritten, with the newest intact checkpoint, if a write fails.
    """
    console = make_console()
    order = rules.chosen(config, stages)
    agreement.compare_runs(config, {"stages": order, "bare": bare, "amend": why, "from_step": from_step})
    agreement.see_checkpoints(config, workdir, order)
    first = mended_rows(config, workdir, bare, console)
    look = partial(work_to_do, config, workdir, order, why, from_step)
    to_train = (work := look()).to_train
    if not to_train and processes.broadcast_from_first(lambda: is_complete(config, workdir, order, bare)):
        finished = "is finished" if len(order) == 1 else "are finished"
        where = workdir if bare else workdir / REPORT_HTML
        console.print(f"Nothing left to do: {', '.join(order)} {finished}. See {where}")
        return 0
    check_fits(
        config, [name for name in to_train if not Checkpoints(workdir / name / CHECKPOINTS, read_only=True).steps()]
    )
    with ExitStack() as held:
        request = held.enter_context(stop_on_signals())
        held.enter_context(naming_intact_checkpoint(workdir, order))
        processes.broadcast_from_first(lambda: held.enter_context(bucket_held(workdir)))
        locks = held.enter_context(StageLocks(workdir))
        take(locks, config, workdir, work, look)
        log, watch = SessionLog(workdir, to_train), Stopwatch()
        with watch.part("tokenize"):
            experiment = processes.on_first_then_all(lambda: prepare(config, workdir, order))
        agreement.compare_data(experiment)
        session = Session(experiment, console)
        with session.on_mesh(), session.watchdog.watching():
            session.watchdog.at(0, "loading")  # parents, to check and evaluate them
            with watch.part("prepare"):
                begin(session, to_train, bare)
            facts = session.facts() if processes.is_first() else {}
            write_log(log, facts, watch)
            if not bare:
                evaluate_first_rows(session)
                check_ancestry(config, workdir, order)
            evaluate_outdated(session, first, [name for name in order if name not in to_train])
            for name in to_train:
                trained = not request.signal and run_stage(experiment.stages[name], session, request)
                write_log(log, facts, watch)
                if not trained:
                    console.print(f"Stopped by {request.name}; everything is saved. Rerun the command to resume.")
                    return request.exit
                locks.release(name)
        check_ancestry(config, workdir, order)
        write_log(log, facts, watch)
        if processes.is_first():
            conclude(config, workdir, order, bare, console)
    return 0


def mended_rows(config: RunConfig, workdir: Path, bare: bool, console: Console) -> list[str]:
    """The rows before those of the stages, once damaged files are set aside. bare: none.

    Raises UserError for a row of another config.
    """
    first = [] if bare else first_rows(config, workdir)
    for line in processes.broadcast_from_first(lambda: mend(workdir, [*first, *config.stages])):
        console.print(line, style="bold red")
    for name in first:
        check_record(workdir, config, name)
    return first


def conclude(config: RunConfig, workdir: Path, order: list[str], bare: bool, console: Console) -> None:
    """Print which other stages were trained from what a stage of this command was before; unless `bare`, report."""
    for name in (each for each in config.stages if each not in order):
        if changed := changed_parent(config, workdir, name):
            console.print(f"warning: {changed}", style=WARNING)
    if not bare:
        write_report(config, workdir, console)
        ask = f"Ask every stage in a browser: python -m llm3 serve --workdir={workdir}"
        console.print(ask, soft_wrap=True)


def work_to_do(config: RunConfig, workdir: Path, order: list[str], why: str, from_step: int | None) -> Work:
    """What is left to do of the chosen stages; the arguments are those of `run`. Raises UserError."""
    amendments = planned_amendments(config, workdir, order, why, from_step)
    return Work(amendments, stages_to_train(config, workdir, order, amendments))


def take(locks: StageLocks, config: RunConfig, workdir: Path, work: Work, look: Callable[[], Work]) -> None:
    """Take the stages to train and amend them. look: finds the work again.

    Raises UserError if another run has one of them, or has done some of the work since it was found.
    """
    with processes.held_by_first(lambda: shared(workdir)):
        check_shared(workdir)
        processes.broadcast_from_first(lambda: locks.take(work.to_train))
        now = look()
        plans = [{name: each._replace(when="") for name, each in w.amendments.items()} for w in (work, now)]
        if plans[0] != plans[1] or work.to_train != now.to_train:
            raise UserError(f"{workdir}: another run has finished or changed a stage just now: rerun the command")
        processes.broadcast_from_first(lambda: apply(workdir, config, work.amendments))


def stages_to_train(config: RunConfig, workdir: Path, order: list[str], amendments: dict[str, Amendment]) -> list[str]:
    """The chosen stages that have no row or are to be changed.

    Raises UserError if the parent of one is missing, or is trained by another run.
    """
    check_ancestry(config, workdir, order)
    found = processes.broadcast_from_first(
        lambda: [name for name in order if name in amendments or not (workdir / name / ROW).is_file()]
    )
    processes.broadcast_from_first(lambda: check_parents(config, workdir, found))
    for name in found:
        locate_parent(config, workdir, name, found)
    return found


def write_log(log: SessionLog, facts: dict, watch: Stopwatch) -> None:
    """Note what this command did so far, on the first process."""
    if processes.is_first():
        log.write(facts, watch.seconds)


def planned_amendments(
    config: RunConfig, workdir: Path, order: list[str], why: str, from_step: int | None
) -> dict[str, Amendment]:
    """How stages that have begun change, by name; the arguments are those of `run`. Raises UserError."""
    back = stage_to_go_back(workdir, order, from_step)
    plans = {name: planned(workdir, config, name, why, from_step if name == back else None) for name in order}
    found = {name: plan for name, plan in plans.items() if plan}
    check_children(workdir, config, list(found), order)
    return found


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


def begin(session: Session, to_train: list[str], bare: bool) -> None:
    """Check all stages to train, then write the files of the run; bare: without rows for what they start from."""
    check_all_before_training(session, to_train)
    keep_model(session)
    processes.broadcast_from_first(lambda: write_run_files(session, bare))
    if processes.is_first():
        session.print_header()


def write_run_files(session: Session, bare: bool) -> None:
    """Write the files that all runs in a workdir share. Raises UserError if another one has begun it otherwise."""
    path, tokenizer = session.workdir / TOKENIZER, session.experiment.tokenizer
    with shared(session.workdir):
        if path.is_file() and (saved := Tokenizer.load(path).hash) != tokenizer.hash:
            raise UserError(
                f"{path} is another tokenizer ({saved[:12]}) than this run's ({tokenizer.hash[:12]}): another run has "
                f"begun this workdir with it: use another --workdir"
            )
        if not bare:
            write_records(session)
        with writing(path):
            tokenizer.save(path)
        if template := session.experiment.library.template:
            with writing(session.workdir / CHAT_TEMPLATE):
                write_atomic(session.workdir / CHAT_TEMPLATE, template)
        write_json(session.workdir / RESOLVED, as_dict(session.config))


def make_console() -> Console:
    """A console that is silent on all processes but the first."""
    return new_console(quiet=not processes.is_first())


def is_complete(config: RunConfig, workdir: Path, order: list[str], bare: bool = False) -> bool:
    """Whether these stages and the rows before them are in the report, with all evaluations of the config.

    bare: whether these stages alone have their rows.
    """
    if not all((workdir / each).is_file() for each in (TOKENIZER, RESOLVED)):  # it was damaged
        return False
    if bare:
        return is_current(config, workdir, order)
    first = [
        name
        for name in first_rows(config, workdir)
        if (workdir / name / ROW).is_file() or not unreadable(config, workdir, name)
    ]
    names = [*first, *order]
    measured = all((workdir / name / ROW).is_file() for name in names)
    return measured and is_reported(workdir, names) and is_current(config, workdir, names)


def is_reported(workdir: Path, names: list[str]) -> bool:
    """Whether there is a report with these rows."""
    matrix = read_json(workdir / MATRIX) or {"rows": [], "baselines": []}
    reported = {row["stage"] for row in matrix["rows"] + matrix["baselines"]}
    return reported.issuperset(names) and (workdir / REPORT_HTML).is_file()

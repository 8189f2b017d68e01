"""Evaluates a stage and writes its row of the matrix."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from rich.console import Console

from llm3.checkpoints.digests import DIGEST_FORMAT, digests_of
from llm3.distributed import interrupts, memory, processes
from llm3.errors import UserError, nearest
from llm3.evals import Counting, uncounted
from llm3.files import DETAILS, ROW, write_json
from llm3.report.console import counting
from llm3.report.logs import MetricsWriter
from llm3.report.predictions import Columns, write_predictions
from llm3.segments import segmented
from llm3.stages.evaluated import majority
from llm3.stages.evaluation import Evaluation, Subject, subject_of
from llm3.stages.session import Session
from llm3.stages.stage import Stage
from llm3.tree import combine_digests, flatten, size


class Measured(NamedTuple):
    """Results by names that begin with that of the evaluation. predictions: see `llm3.report.predictions`."""

    metrics: dict[str, float | None]
    details: dict[str, Any]
    predictions: dict[str, Columns]

    def add(self, other: "Measured") -> None:
        """Add the results of other evaluations."""
        self.metrics.update(other.metrics)
        self.details.update(other.details)
        self.predictions.update(other.predictions)


NOTHING: Mapping[str, Measured] = MappingProxyType({})


def measure(
    session: Session,
    subject: Subject,
    params: dict,
    only: Evaluation | None = None,
    alive: Callable[[], None] | None = None,
    known: Mapping[str, Measured] = NOTHING,
) -> Measured:
    """The results of canonical parameters, from all evaluations that apply to the subject.

    only: run just this evaluation. alive: called after each batch; None: tells the watchdog. known:
    {evaluation: its results of the same parameters}, which are taken over. A non-finite metric becomes None.
    """
    name, model = subject.name, subject.model
    one_segment = segmented(params, ((0, model.layers),))
    found = Measured({}, {}, {})
    tokenizer, compiled = session.experiment.tokenizer, session.compiled_evaluations
    for evaluation in [only] if only else session.experiment.evaluations:
        if not evaluation.applies(subject):
            continue
        if evaluation.name in known:
            found.add(known[evaluation.name])
            continue
        shown = progress(f"{name}: evaluating {evaluation.name}", alive or session.watchdog.alive, session.console)
        with (
            interrupts.doing(f"evaluating {evaluation.name} of {name}"),
            memory.explained(f"config.evaluations.{evaluation.name}", evaluation_fields(evaluation.name)),
            session.watch.part("evaluate"),
        ):
            measured = evaluation.measure(one_segment, model, tokenizer, session.mesh, compiled, shown)
        found.add(plain(name, evaluation.name, measured, session.console))
    return found


def progress(label: str, alive: Callable[[], None] = lambda: None, console: Console | None = None) -> Counting:
    """Shows on the first process how much of an evaluation is done, and calls `alive` after each batch."""

    @contextmanager
    def shown(total: int, unit: str) -> Iterator[Callable[[int], None]]:
        with counting(total, label, unit, console) if processes.is_first() else uncounted(total, unit) as advance:

            def done(number: int) -> None:
                alive()
                advance(number)

            yield done

    return shown


def plain(stage: str, evaluation: str, measured: dict[str, Any], console: Console) -> Measured:
    """The result of an evaluation, with the evaluation's name in front of the keys.

    A metric that is not finite is printed, and None.
    """
    found = Measured({}, {}, {})
    for name, value in measured.items():
        key = f"{evaluation}_{name}" if evaluation else name
        if name == "predictions":
            several = all(isinstance(each, Mapping) for each in value.values())
            tasks = {f"{evaluation}_{task}".lstrip("_"): columns for task, columns in value.items()}
            found.predictions.update(tasks if several else {evaluation: value})
            continue
        if isinstance(value, dict | list):
            found.details[key] = value
            continue
        if value is not None and not math.isfinite(value):
            console.print(f"{stage}: {key} is {value}", style="bold red")
            value = None
        found.metrics[key] = value
    return found


def evaluation_fields(name: str) -> list[str]:
    """Three fields that lower the memory of an evaluation, the most helpful first."""
    where = f"config.evaluations.{name}"
    return [f"{where}.batch_size", f"{where}.sequence_length", "config.mesh.fsdp (more devices)"]


def evaluate_subject(
    session: Session, subject: Subject, params: dict, known: Mapping[str, Measured] = NOTHING
) -> tuple[dict[str, Any], Measured]:
    """The row of the matrix for canonical parameters, and what it is made of. known: see `measure`."""
    session.console.print(f"{subject.name}: evaluating")
    started = time.perf_counter()
    measured = measure(session, subject, params, known=known)
    return {
        "stage": subject.name,
        **measured.metrics,
        "majority_accuracy": majority(measured.metrics),
        "params": size(params),
        "params_digest": digest_of(params),
        "evaluation_seconds": time.perf_counter() - started,
        "evaluations": session.experiment.evaluation_entries,
    }, measured


def digest_of(params: dict, format: int = DIGEST_FORMAT) -> str:
    """The digest of canonical parameters, as in the metadata of their checkpoint."""
    return combine_digests(digests_of(flatten(params), format))


def write_row(
    session: Session,
    subject: Subject,
    params: dict,
    cost: dict,
    writer: MetricsWriter | None = None,
    known: Mapping[str, Measured] = NOTHING,
) -> None:
    """Evaluate the parameters and save the row, with their cost. Adds the time of it to `wall_seconds`.

    writer: also shows the row.
    known: see `measure`.
    """
    row, measured = evaluate_subject(session, subject, params, known)
    directory = session.workdir / row["stage"]
    spent: dict[str, float] = cost.get("wall_seconds", {})
    row |= cost | {"wall_seconds": spent | {"evaluate": spent.get("evaluate", 0.0) + row["evaluation_seconds"]}}

    def write() -> None:
        if writer is not None:
            writer.result(row["steps"], row)
        write_results(directory, row, measured.details, measured.predictions)

    processes.broadcast_from_first(write)


def write_results(
    directory: Path, row: dict[str, Any], details: dict[str, Any], predictions: Mapping[str, Columns]
) -> None:
    """Write the files of a row; the row itself, which marks them complete, last. directory: of the stage."""
    for name, columns in predictions.items():
        write_predictions(directory, name, columns)
    if details:
        write_json(directory / DETAILS, details)
    write_json(directory / ROW, row)


def best_metric(evaluations: list[Evaluation], stage: Stage) -> tuple[int, Evaluation]:
    """The sign of the stage's `best` metric (1: lower is better, -1: higher is better) and its evaluation.

    Raises UserError if the stage has no such metric.
    """
    sign = {
        f"{evaluation.name}_{metric}": (1 if better == "lower" else -1, evaluation)
        for evaluation in evaluations
        if evaluation.applies(subject_of(stage))
        for metric, better in evaluation.better.items()
    }
    if (best := stage.config.best) not in sign:
        raise UserError(f"{stage.where}.best={best!r}: no such metric of this stage; {nearest(best, sign)}")
    return sign[best]

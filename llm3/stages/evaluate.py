"""Evaluates a stage and writes its row of the matrix."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from llm3.checkpoints.metadata import digests_of
from llm3.distributed import memory, processes
from llm3.errors import UserError, nearest
from llm3.evals import Counting, uncounted
from llm3.files import DETAILS, ROW, write_json
from llm3.report.console import counting
from llm3.segments import segmented
from llm3.stages.evaluation import Evaluation, Subject, subject_of
from llm3.stages.session import Session
from llm3.stages.stage import Stage
from llm3.tree import combine_digests, flatten, size


def measure(
    session: Session,
    subject: Subject,
    params: dict,
    only: Evaluation | None = None,
    alive: Callable[[], None] = lambda: None,
) -> tuple[dict[str, float | None], dict[str, Any]]:
    """Metrics and details of canonical parameters, from all evaluations that apply to the subject.

    only: run just this evaluation. alive: called after each batch. A non-finite metric becomes None.
    """
    name, model = subject.name, subject.model
    one_segment = segmented(params, ((0, model.layers),))
    metrics: dict[str, float | None] = {}
    details: dict[str, Any] = {}
    tokenizer, compiled = session.experiment.tokenizer, session.compiled_evaluations
    for evaluation in [only] if only else session.experiment.evaluations:
        if not evaluation.applies(subject):
            continue
        with memory.explained(f"config.evaluations.{evaluation.name}", evaluation_fields(evaluation.name)):
            shown = progress(f"{name}: {evaluation.name}", alive)
            measured = evaluation.measure(one_segment, model, tokenizer, session.mesh, compiled, shown)
        own_metrics, own_details = plain(name, evaluation.name, measured, session.console)
        metrics |= own_metrics
        details |= own_details
    return metrics, details


def progress(label: str, alive: Callable[[], None] = lambda: None) -> Counting:
    """Shows on the first process how much of an evaluation is done, and calls `alive` after each batch."""

    @contextmanager
    def shown(total: int, unit: str) -> Iterator[Callable[[int], None]]:
        with counting(total, label, unit) if processes.is_first() else uncounted(total, unit) as advance:

            def done(number: int) -> None:
                alive()
                advance(number)

            yield done

    return shown


def plain(
    stage: str, evaluation: str, measured: dict[str, Any], console: Console
) -> tuple[dict[str, float | None], dict[str, Any]]:
    """The result of an evaluation as metrics and details, with the evaluation's name in front of the keys.

    A metric that is not finite is printed, and None.
    """
    metrics: dict[str, float | None] = {}
    details: dict[str, Any] = {}
    for name, value in measured.items():
        key = f"{evaluation}_{name}" if evaluation else name
        if isinstance(value, dict | list):
            details[key] = value
            continue
        if value is not None and not math.isfinite(value):
            console.print(f"{stage}: {key} is {value}", style="bold red")
            value = None
        metrics[key] = value
    return metrics, details


def evaluation_fields(name: str) -> list[str]:
    """Three fields that lower the memory of an evaluation, the most helpful first."""
    where = f"config.evaluations.{name}"
    return [f"{where}.batch_size", f"{where}.sequence_length", "config.mesh.fsdp (more devices)"]


def evaluate_subject(session: Session, subject: Subject, params: dict) -> tuple[dict, dict]:
    """The row of the matrix for canonical parameters, and the details."""
    session.console.print(f"{subject.name}: evaluating")
    started = time.perf_counter()
    metrics, details = measure(session, subject, params)
    constant = [value for key, value in metrics.items() if key.endswith("_majority_accuracy")]
    return {
        "stage": subject.name,
        **metrics,
        "majority_accuracy": constant[0] if len(constant) == 1 else None,
        "params": size(params),
        "params_digest": combine_digests(digests_of(flatten(params))),
        "evaluation_seconds": time.perf_counter() - started,
    }, details


def write_row(session: Session, subject: Subject, params: dict, cost: dict) -> None:
    """Evaluate the parameters and save the row, with their cost."""
    row, details = evaluate_subject(session, subject, params)
    directory = session.workdir / row["stage"]

    def write() -> None:
        if details:
            write_json(directory / DETAILS, details)
        write_json(directory / ROW, row | cost)

    processes.broadcast_from_first(write)


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

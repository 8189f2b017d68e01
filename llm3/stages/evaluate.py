"""What is measured of a stage: its evaluations, and the row of the matrix that they make."""

import math
import time
from typing import Any

from llm3.checkpoints.metadata import digests_of
from llm3.distributed import processes
from llm3.errors import UserError, nearest
from llm3.files import DETAILS, INIT, ROW, read_json, write_json
from llm3.models.transformer import init
from llm3.segments import segmented
from llm3.stages.evaluation import Evaluation
from llm3.stages.session import Session
from llm3.stages.stage import Stage
from llm3.tree import combine_digests, flatten, size


def measure(
    session: Session, stage: Stage | None, params: dict, only: Evaluation | None = None
) -> tuple[dict[str, float | None], dict[str, Any]]:
    """All evaluations of canonical parameters that apply to a stage (None: untrained): figures, and details.

    only: that one evaluation. A figure that is not finite is None.
    """
    name, model = (INIT, session.experiment.init_model) if stage is None else (stage.name, stage.model)
    whole, figures, details = segmented(params, ((0, model.layers),)), {}, {}
    tokenizer, compiled = session.experiment.tokenizer, session.compiled_evaluations
    for evaluation in [only] if only else session.experiment.evaluations:
        if not evaluation.applies(stage):
            continue
        for figure, value in evaluation.measure(whole, model, tokenizer, session.mesh, compiled).items():
            key = f"{evaluation.name}_{figure}"
            if isinstance(value, dict | list):
                details[key] = value
                continue
            if not math.isfinite(value):
                session.console.print(f"{name}: {key} is {value}", style="bold red")
            figures[key] = value if math.isfinite(value) else None
    return figures, details


def evaluate_stage(session: Session, stage: Stage | None, params: dict) -> tuple[dict, dict]:
    """The figures of a stage's canonical parameters (None: untrained) as a row of the matrix, and their details."""
    name = stage.name if stage else INIT
    session.console.print(f"{name}: evaluating")
    started = time.perf_counter()
    figures, details = measure(session, stage, params)
    constant = [value for key, value in figures.items() if key.endswith("_majority_accuracy")]
    return {
        "stage": name,
        **figures,
        "majority_accuracy": constant[0] if len(constant) == 1 else None,
        "params": size(params),
        "params_digest": combine_digests(digests_of(flatten(params))),
        "evaluation_seconds": time.perf_counter() - started,
    }, details


def write_row(session: Session, stage: Stage | None, params: dict, cost: dict) -> None:
    """Evaluate the parameters, and keep the row with what they cost."""
    row, details = evaluate_stage(session, stage, params)
    directory = session.workdir / row["stage"]

    def write() -> None:
        if details:
            write_json(directory / DETAILS, details)
        write_json(directory / ROW, row | cost)

    processes.broadcast_from_first(write)


def evaluate_init(session: Session) -> None:
    """The untrained model's row, once."""
    if not processes.broadcast_from_first(lambda: bool(read_json(session.workdir / INIT / ROW))):
        params = init(session.experiment.init_model, session.experiment.init_seed, session.mesh)
        write_row(session, None, params, {"tokens": 0, "flops": 0.0, "seconds": 0.0, "trainable_params": 0})


def best_figure(evaluations: list[Evaluation], stage: Stage) -> tuple[int, Evaluation]:
    """1 where less of the stage's `best` figure is better, else -1, and the evaluation that gives it.

    Raises UserError for a figure that the stage does not have.
    """
    sign = {
        f"{evaluation.name}_{figure}": (1 if way == "lower" else -1, evaluation)
        for evaluation in evaluations
        if evaluation.applies(stage)
        for figure, way in evaluation.plugin.BETTER.items()
    }
    if (best := stage.config.best) not in sign:
        raise UserError(f"{stage.where}.best={best!r}: no such figure of this stage; {nearest(best, sign)}")
    return sign[best]

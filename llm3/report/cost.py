"""The bytes, FLOPs and time of a step of each stage, compared with full fine-tuning of the same model."""

import statistics
from typing import Any

from llm3.report.units import NOT_APPLICABLE, count, mebibytes, milliseconds

LEGEND = (
    "In brackets: the share of the cost of full fine-tuning, for the same model and optimizer. Parameters, gradients "
    "and moments are bytes in memory during a step; temporary is the additional memory that the compiler reports. "
    "FLOPs are model FLOPs by formula, forward + backward, without what remat computes again. Step time is measured, "
    "without compilation; its share is known "
    "if a stage of this run trains all parameters on batches of the same shape. For a stage that unfreezes parameters, "
    "the numbers are those of its last phase."
)


def measured(rows: list[dict]) -> list[dict]:
    """The rows of stages whose step cost is known."""
    return [row for row in rows if row.get("gradient_bytes") is not None]


def any_frozen(rows: list[dict]) -> bool:
    """Whether any of these stages has frozen parameters."""
    return any(row["trainable_params"] < row["params"] for row in measured(rows))


def share(text: str, value: float | None, full: float | None) -> str:
    """A formatted value, followed by its share of the value for full fine-tuning, if known."""
    if value is None or not full:
        return text
    percentage = 100 * value / full
    return f"{text} ({percentage:.{0 if percentage >= 9.95 else 1}f} %)"


def flops_per_token(row: dict) -> str:
    """Forward + backward FLOPs per token, and the share of their sum."""
    forward, backward = row["forward_flops_per_token"], row["backward_flops_per_token"]
    if forward is None or backward is None:
        return NOT_APPLICABLE
    return share(f"{count(forward)} + {count(backward)}", forward + backward, row["full_flops_per_token"])


COLUMNS = (
    ("\nstage", lambda row: row["stage"]),
    ("trained\nparameters", lambda row: share(count(row["trainable_params"]), row["trainable_params"], row["params"])),
    (
        "params\nMiB",
        lambda row: share(mebibytes(row["param_bytes"]), row["param_bytes"], row["full_param_bytes"]),
    ),
    (
        "gradients\nMiB",
        lambda row: share(mebibytes(row["gradient_bytes"]), row["gradient_bytes"], row["full_gradient_bytes"]),
    ),
    (
        "moments\nMiB",
        lambda row: share(mebibytes(row["moment_bytes"]), row["moment_bytes"], row["full_moment_bytes"]),
    ),
    ("temporary\nMiB", lambda row: mebibytes(row["temp_bytes"])),
    ("FLOPs a token\nforward + backward", flops_per_token),
    (
        "step\nms",
        lambda row: share(milliseconds(row["step_seconds"]), row["step_seconds"], row["full_step_seconds"]),
    ),
)


def savings(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """The column heads (two lines each) and the cells, one line for each `measured` row.

    rows: as returned by `complete`.
    """
    return [head for head, _ in COLUMNS], [[cell(row) for _, cell in COLUMNS] for row in measured(rows)]


def with_full_step_seconds(rows: list[dict], shapes: dict[str, Any], full: set[str]) -> list[dict]:
    """The rows with `full_step_seconds`: the step time of the run's full-training stages with the same step shape.

    shapes: {stage: what decides the cost of its step besides the trainable parameters}. full: names of the stages that
    train all parameters.
    """

    def full_seconds(row: dict) -> float | None:
        own = shapes.get(row["stage"])
        alike = [other for other in rows if other["stage"] in full and shapes[other["stage"]] == own]
        seconds = [other["step_seconds"] for other in alike if other.get("step_seconds")]
        return statistics.mean(seconds) if seconds else None

    return [row | {"full_step_seconds": full_seconds(row)} for row in rows]

"""What a step of each stage takes, beside training all of the same model: bytes, FLOPs and time."""

from llm3.report.units import NOT_APPLICABLE, count, mebibytes, milliseconds

LEGEND = (
    "In brackets: the share of what full fine-tuning takes, of the same model with the same optimizer. Parameters, "
    "gradients and moments are the bytes that the step holds of each; temporary is the compiler's count of what a step "
    "needs beside them. FLOPs are those of the formula, forward + backward. Step time is measured, without compiling; "
    "its share is known where a stage of this run trains everything on batches of the same shape. Of a stage that "
    "unfreezes, it is the last phase."
)


def measured(rows: list[dict]) -> list[dict]:
    """The rows of trained stages that know what a step of theirs takes."""
    return [row for row in rows if row.get("gradient_bytes") is not None]


def trains_a_part(rows: list[dict]) -> bool:
    """Whether any of these stages trains less than all."""
    return any(row["trainable_params"] < row["params"] for row in measured(rows))


def share(text: str, value: float | None, full: float | None) -> str:
    """A figure with what share of the full one it is, where that is known."""
    if value is None or not full:
        return text
    percentage = 100 * value / full
    return f"{text} ({percentage:.{0 if percentage >= 9.95 else 1}f} %)"


def flops_per_token(row: dict) -> str:
    """Forward + backward, and the share of their sum."""
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
    """The heads of the columns (of two lines each) and the cells, one line for each row that was `measured`.

    The rows are complete.
    """
    return [head for head, _ in COLUMNS], [[text(row) for _, text in COLUMNS] for row in measured(rows)]

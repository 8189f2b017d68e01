"""The matrix of stages and evaluations: one row a stage, the same keys in every row, null where nothing applies.

Evaluation figures are keys `<evaluation>_<metric>`, e.g. `general_bits_per_byte` and `task_accuracy`: a run with other
evaluations has other keys. `<evaluation>_majority_accuracy` (or `majority_accuracy`, for every evaluation) is
the accuracy of always giving the commonest class; `<evaluation>_items` is how many examples an accuracy is over.

What a step takes: `param_bytes`, `gradient_bytes`, `moment_bytes` of the training state, `temp_bytes` by the compiler's
count, FLOPs a token by formula, `step_seconds` as measured; `full_*` are those of training all of the same model with
the same optimizer on batches of the same shape. Rows with equal `recipe` differ in nothing but `seed`.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from llm3.files import write_json
from llm3.report.units import plain

KEYS = (
    "stage",
    "general_bits_per_byte",
    "general_bits_per_byte_change",
    "domain_bits_per_byte",
    "task_accuracy",
    "task_macro_f1",
    "majority_accuracy",
    "tokens",
    "flops",
    "seconds",
    "peak_bytes",
    "params",
    "trainable_params",
    "param_bytes",
    "gradient_bytes",
    "moment_bytes",
    "temp_bytes",
    "forward_flops_per_token",
    "backward_flops_per_token",
    "step_seconds",
    "full_param_bytes",
    "full_gradient_bytes",
    "full_moment_bytes",
    "full_flops_per_token",
    "full_step_seconds",
    "seed",
    "recipe",
    "params_digest",
)

# Longest first: task_macro_f1 is the macro_f1 of task, and a majority_accuracy is no accuracy of the model. Those that
# are None are in matrix.json only.
METRICS = {
    "pseudo_bits_per_byte": "pseudo_bits_per_byte",
    "bits_per_byte": "bits_per_byte",
    "per_character_accuracy": None,
    "unconditional_accuracy": None,
    "majority_accuracy": None,
    "majority_exact_match": None,
    "accuracy": "accuracy",
    "macro_f1": "macro_f1",
    "micro_f1": None,
    "exact_match": "exact_match",
    "pseudo_perplexity": None,
    "rouge_l": "rouge_l",
    "f1": "f1",
}


class Figure(NamedTuple):
    """A key of a row, read as the `metric` of an `evaluation`."""

    key: str
    evaluation: str
    metric: str


def figures(rows: list[dict]) -> list[Figure]:
    """The evaluation figures that at least one of `rows` has, in their order in the rows; majority classes left out."""
    found: dict[str, Figure] = {}
    for key in (key for row in rows for key, value in row.items() if value is not None):
        metric = METRICS.get(next((metric for metric in METRICS if key.endswith(f"_{metric}")), ""))
        if metric and key != "majority_accuracy":
            found[key] = Figure(key, key.removesuffix(f"_{metric}"), metric)
    return sorted(found.values(), key=lambda figure: figure.metric != "bits_per_byte")


def majority(row: dict, evaluation: str) -> float | None:
    """The accuracy of the majority class in `evaluation`."""
    own = row.get(f"{evaluation}_majority_accuracy")
    return row.get("majority_accuracy") if own is None else own


def standard_error(row: dict, figure: Figure) -> float | None:
    """The binomial standard error sqrt(p (1 - p) / n) of an accuracy; None where <evaluation>_items is not known."""
    share, items = row[figure.key], row.get(f"{figure.evaluation}_items")
    return math.sqrt(share * (1 - share) / items) if items else None


def parent_of(rows: list[dict], row: dict) -> dict | None:
    """The row that `row` started from: that of the stage in its `parent` key, or without one the row before it."""
    if row.get("parent"):
        return next((other for other in rows if other["stage"] == row["parent"]), None)
    index = next((i for i, other in enumerate(rows) if other is row), 0)
    return rows[index - 1] if index else None


def complete(rows: list[dict], baselines: list[dict]) -> tuple[list[dict], list[dict]]:
    """`rows` and `baselines` with every key of the schema and with the changes of bits per byte since the parent.

    The parent is `parent_of`; a baseline without a `parent` key has none. A change that is given is kept. Raises
    ValueError for a figure that is not finite: a figure that does not apply is None.
    """
    rows, baselines = (
        [{key: plain(value) for key, value in row.items()} for row in part] for part in (rows, baselines)
    )
    keys = dict.fromkeys([*KEYS, *(key for row in [*rows, *baselines] for key in row)])
    changes = {f"{key}_change": key for key in keys if key.endswith("_bits_per_byte")}

    def completed(row: dict, parent: dict | None) -> dict:
        whole: dict[str, Any] = {key: row.get(key) for key in [*keys, *changes]}
        for change, key in changes.items():
            if whole[change] is None and parent and None not in (row.get(key), parent.get(key)):
                whole[change] = row[key] - parent[key]
        for key, value in whole.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{key} of {row['stage']} is {value}; a figure that does not apply is None")
        return whole

    stages = [*rows, *baselines]
    return (
        [completed(row, parent_of(rows, row)) for row in rows],
        [completed(row, parent_of(stages, row) if row.get("parent") else None) for row in baselines],
    )


def write_matrix(path: Path | str, rows: list[dict], baselines: list[dict]) -> None:
    """Write {"rows": [...], "baselines": [...]} as JSON, whole or not at all. Raises ValueError as `complete` does."""
    main, beside = complete(rows, baselines)
    write_json(Path(path), {"rows": main, "baselines": beside})


def read_matrix(path: Path | str) -> tuple[list[dict], list[dict]]:
    """The rows and baselines that `write_matrix` wrote."""
    matrix = json.loads(Path(path).read_text(encoding="utf-8"))
    return matrix["rows"], matrix["baselines"]

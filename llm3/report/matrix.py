"""The matrix of stages and evaluations: one row per stage, the same keys in every row, null where nothing applies.

Evaluation metrics have keys `<evaluation>_<metric>`, e.g. `general_bits_per_byte` and `task_accuracy`, so the keys
depend on the evaluations of a run. `<evaluation>_majority_accuracy` (or `majority_accuracy`, for all evaluations) is
the accuracy of always predicting the most frequent class. `<evaluation>_items` is the number of examples, and
`<evaluation>_<metric>_stderr` the standard error of a metric; a metric with that key needs no entry in `METRICS`.
`other_data` lists the evaluations that measured this row on other documents, or otherwise, than most rows: their values
do not compare with those of other rows.

The cost of a step: `param_bytes`, `gradient_bytes` and `moment_bytes` of the training state, `temp_bytes` as reported
by the compiler, model FLOPs per token by formula, `step_seconds` as measured. `first_step_seconds`: from the start of
the last command that trained the stage, or of the stage if it was not the first one there, to the end of its first
step. `full_*` are the same for full fine-tuning of the same model with the same optimizer and batch shape. Rows with
equal `recipe` differ only in `seed`.
"""

import json
import math
from collections import Counter
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
    "first_step_seconds",
    "full_param_bytes",
    "full_gradient_bytes",
    "full_moment_bytes",
    "full_flops_per_token",
    "full_step_seconds",
    "seed",
    "recipe",
    "params_digest",
)

# The first matching suffix wins: task_macro_f1 is a macro_f1, not an f1. Metrics that map to None appear in matrix.json
# only.
METRICS = {
    "pseudo_bits_per_byte": "pseudo_bits_per_byte",
    "bits_per_byte": "bits_per_byte",
    "per_character_accuracy": None,
    "unconditional_accuracy": None,
    "majority_accuracy": None,
    "majority_exact_match": None,
    "accuracy": "accuracy",
    "acc_norm": "acc_norm",
    "acc": "acc",
    "macro_f1": "macro_f1",
    "micro_f1": None,
    "exact_match": "exact_match",
    "pseudo_perplexity": None,
    "word_perplexity": None,
    "byte_perplexity": None,
    "rouge_l": "rouge_l",
    "f1": "f1",
}


OTHER_DATA = "other_data"  # a key that rows have only where one of them needs it
LOWER_IS_BETTER = ("bits_per_byte", "perplexity", "nll", "brier", "ece")  # where a row does not say what is better


class Metric(NamedTuple):
    """A key of a row, split into the evaluation and the name of the metric."""

    key: str
    evaluation: str
    name: str
    lower_is_better: bool


def metrics_of(rows: list[dict]) -> list[Metric]:
    """The metrics that at least one row has: bits per byte first, then in row order; without majority classes.

    Of an evaluation without any metric of `METRICS`, those that its plugin declares (the row's `better`).
    """
    found: dict[str, Metric] = {}
    better = {key: each for row in rows for key, each in (row.get("better") or {}).items()}
    with_error = {key for row in rows for key in row if f"{key}_stderr" in row}
    for key in (key for row in rows for key, value in row.items() if value is not None):
        unlisted = key.rpartition("_")[2] if key in with_error else None
        name = METRICS.get(next((name for name in METRICS if key.endswith(f"_{name}")), ""), unlisted)
        if name and key != "majority_accuracy":
            lower = better.get(key) == "lower" if key in better else name.endswith(LOWER_IS_BETTER)
            found[key] = Metric(key, key.removesuffix(f"_{name}"), name, lower)
    listed = {each.evaluation for each in found.values()}
    for row in rows:
        for evaluation in (each for each in row.get("evaluation_digests") or () if each not in listed):
            for key, each in better.items():
                if key.startswith(f"{evaluation}_") and row.get(key) is not None:
                    found[key] = Metric(key, evaluation, key.removeprefix(f"{evaluation}_"), each == "lower")
    return sorted(found.values(), key=lambda metric: metric.name != "bits_per_byte")


def majority(row: dict, evaluation: str) -> float | None:
    """The accuracy of the majority class in `evaluation`."""
    own = row.get(f"{evaluation}_majority_accuracy")
    return row.get("majority_accuracy") if own is None else own


def standard_error(row: dict, metric: Metric) -> float | None:
    """The standard error of a metric: given, or else the binomial one of an accuracy, sqrt(p (1 - p) / n).

    None if neither it nor <evaluation>_items is known.
    """
    if f"{metric.key}_stderr" in row:
        return row[f"{metric.key}_stderr"]
    share, items = row[metric.key], row.get(f"{metric.evaluation}_items")
    return math.sqrt(share * (1 - share) / items) if items else None


def parent_of(rows: list[dict], row: dict) -> dict | None:
    """The parent row of `row`: the one named by its `parent` key, or without that key the previous row."""
    if "parent" in row:
        return next((other for other in rows if other["stage"] == row["parent"]), None)
    index = next((i for i, other in enumerate(rows) if other is row), 0)
    return rows[index - 1] if index else None


def comparable(row: dict, other: dict, evaluation: str) -> bool:
    """Whether two rows were measured alike on the same data, as far as both tell: by their `evaluation_digests`."""
    digests = [_digest(each, evaluation) for each in (row, other)]
    return None in digests or digests[0] == digests[1]


def on_other_data(row: dict, evaluation: str) -> bool:
    """Whether a complete row was measured by this evaluation on other data than most rows."""
    return evaluation in (row.get(OTHER_DATA) or ())


def _digest(row: dict, evaluation: str) -> str | None:
    return (row.get("evaluation_digests") or {}).get(evaluation)


def _other_data(rows: list[dict]) -> dict[str, list[str]]:
    """{row: the evaluations that measured it on other data than most rows, or where these tie, than the last one}"""
    found: dict[str, list[str]] = {}
    for evaluation in dict.fromkeys(name for row in rows for name in row.get("evaluation_digests") or ()):
        prefix = f"{evaluation}_"
        digests = {
            row["stage"]: digest
            for row in rows
            if (digest := _digest(row, evaluation)) is not None
            and any(key.startswith(prefix) and value is not None for key, value in row.items())
        }
        counts = Counter(reversed(digests.values()))
        for stage, digest in digests.items():
            if digest != max(counts, key=counts.__getitem__):
                found.setdefault(stage, []).append(evaluation)
    return found


def complete(rows: list[dict], baselines: list[dict]) -> tuple[list[dict], list[dict]]:
    """`rows` and `baselines` with all keys of the schema, and with the change of bits per byte since the parent.

    The parent is `parent_of`; a baseline without a `parent` key has none. A given change is kept. There is no change
    since a parent that was measured on other data, or otherwise. Raises ValueError for a value that is not finite: a
    value that does not apply is None.
    """
    rows, baselines = (
        [{key: plain(value) for key, value in row.items()} for row in part] for part in (rows, baselines)
    )
    # those of the rows first: their metrics are in the order of the config's evaluations
    keys = dict.fromkeys([*(key for row in [*rows, *baselines] for key in row), *KEYS])
    if other_data := {} if OTHER_DATA in keys else _other_data([*baselines, *rows]):
        keys[OTHER_DATA] = None
    changes = {f"{key}_change": key for key in keys if key.endswith("_bits_per_byte")}

    def completed(row: dict, parent: dict | None) -> dict:
        filled: dict[str, Any] = {key: row.get(key) for key in [*keys, *changes]}
        if row["stage"] in other_data:
            filled[OTHER_DATA] = other_data[row["stage"]]
        for change, key in changes.items():
            evaluation = key.removesuffix("_pseudo_bits_per_byte").removesuffix("_bits_per_byte")
            measured = parent and None not in (row.get(key), parent.get(key)) and comparable(row, parent, evaluation)
            if filled[change] is None and parent and measured:
                filled[change] = row[key] - parent[key]
        for key, value in filled.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{key} of {row['stage']} is {value}; a value that does not apply is None")
        return filled

    stages = [*rows, *baselines]
    return (
        [completed(row, parent_of(rows, row)) for row in rows],
        [completed(row, parent_of(stages, row) if row.get("parent") else None) for row in baselines],
    )


def write_matrix(path: Path | str, rows: list[dict], baselines: list[dict]) -> None:
    """Write {"rows": [...], "baselines": [...]} as JSON, atomically. Raises ValueError as `complete` does."""
    rows, baselines = complete(rows, baselines)
    write_json(Path(path), {"rows": rows, "baselines": baselines})


def read_matrix(path: Path | str) -> tuple[list[dict], list[dict]]:
    """The rows and baselines of a file from `write_matrix`."""
    matrix = json.loads(Path(path).read_text(encoding="utf-8"))
    return matrix["rows"], matrix["baselines"]

"""Checks of single fields that need more than a line."""

from collections.abc import Mapping, Sequence
from typing import Any

from llm3.errors import UserError, counted, nearest

OPTIMIZERS = ("adamw", "adafactor", "lion", "muon", "sgd")  # the names of llm3.optim.update_rules
MOMENTS = ("float32", "bfloat16", "float8")  # how moments are stored
SCHEDULES = ("constant", "linear", "cosine", "wsd")  # the names of llm3.optim.learning_rates


def check_optimizer(own: Mapping[str, Any], where: str) -> None:
    """Raise UserError, starting with `where`, for an optimizer's field that is out of range by itself."""
    for field, names in (("name", OPTIMIZERS), ("schedule", SCHEDULES)):
        if own[field] not in names:
            raise UserError(f"{where}.{field}={own[field]!r}: {nearest(own[field], names)}")
    for field in (
        "learning_rate",
        "warmup_steps",
        "decay_steps",
        "final_fraction",
        "weight_decay",
        "clip_norm",
        "l2_sp",
    ):
        if not own[field] >= 0:
            raise UserError(f"{where}.{field}={own[field]!r}: expected at least 0")
    if own["decay_steps"] and own["schedule"] != "wsd":
        text = f"belongs to schedule='wsd'; this schedule is {own['schedule']!r}"
        raise UserError(f"{where}.decay_steps={own['decay_steps']} {text}")
    if not 0 < own["layer_decay"] <= 1:
        raise UserError(f"{where}.layer_decay={own['layer_decay']!r}: expected a number above 0, at most 1")
    if not 0 <= own["ema"] < 1:
        raise UserError(f"{where}.ema={own['ema']!r}: expected a decay from 0 up to 1, without 1")
    check_moments(own["name"], own["moments"], own["options"], where)


def check_moments(name: str, moments: str, options: Mapping[str, Any], where: str) -> None:
    """Raise UserError, starting with `where`, unless the moments of the optimizer `name` can be stored like this."""
    if moments not in MOMENTS:
        raise UserError(f"{where}.moments={moments!r}: {nearest(moments, MOMENTS)}")
    if moments != "float32" and name != "adamw":
        raise UserError(f"{where}.moments={moments!r}: expected it only with name='adamw', not {name!r}")
    if moments != "float32" and "mu_dtype" in options:
        raise UserError(f"{where}.options.mu_dtype: expected none with moments={moments!r}, which decides it")


def check_warmup(own: Mapping[str, Any], steps: int, where: str) -> None:
    """Raise UserError, starting with `where`, unless warm-up and decay fit into the steps of a stage."""
    decay = (own["decay_steps"] or max(1, steps // 10)) if own["schedule"] == "wsd" else 0
    if own["warmup_steps"] + decay > steps:
        after = f" and a decay of {decay}" if decay else ""
        raise UserError(
            f"{where}.warmup_steps={own['warmup_steps']}{after}: expected at most the {counted(steps, 'step')} of the "
            "stage"
        )


def check_phases(data_schedule: Sequence[Any], steps: int, where: str) -> list[tuple[int, Mapping[str, float]]]:
    """The pairs (step, weights) of a config's `data_schedule`. Raises UserError, starting with `where`."""
    phases, before = [], 0
    for entry in data_schedule:
        if not (isinstance(entry, list | tuple) and len(entry) == 2 and isinstance(entry[1], Mapping)):
            raise UserError(f"{where}: {entry!r}: expected a pair [step, {{source: weight}}]")
        step, weights = entry
        if type(step) is not int or not before < step < steps:
            raise UserError(
                f"{where}: step {step!r}: expected ascending steps after 0 and before the stage's "
                f"{counted(steps, 'step')}"
            )
        phases.append((step, weights))
        before = step
    return phases


def check_ranges(ranges: Sequence[Any], where: str) -> None:
    """Raise UserError, starting with `where`, unless these are ascending pairs [first, last] of steps from 1 on."""
    before = 0
    for entry in ranges:
        whole = isinstance(entry, list | tuple) and len(entry) == 2 and all(type(each) is int for each in entry)
        if not (whole and before < entry[0] <= entry[1]):
            raise UserError(f"{where}: {entry!r}: expected ascending pairs [first, last] of steps, counted from 1")
        before = entry[0]


def check_early_stopping(own: Mapping[str, Any], where: str) -> None:
    """Raise UserError, starting with `where`, unless a stage that stops early evaluates what it stops by."""
    for field in ("eval_every", "eval_documents", "patience", "min_delta"):
        if not own[field] >= 0:
            raise UserError(f"{where}.{field}={own[field]!r}: expected at least 0")
    purposes = {
        "eval_every": "the steps between evaluations",
        "best": "the metric that should improve",
        "patience": "the number of evaluations to wait for an improvement",
    }
    needed = [("eval_names", "eval_every"), ("eval_documents", "eval_every"), ("patience", "eval_every")]
    for field, other in [*needed, ("patience", "best"), ("min_delta", "patience")]:
        if own[field] and not own[other]:
            raise UserError(f"{where}.{field}={own[field]!r}: needs {other}, {purposes[other]}")

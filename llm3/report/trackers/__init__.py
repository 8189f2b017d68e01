"""Where the metrics of a stage go: a tracker is one file of this folder, found by its name.

A tracker defines

    class Tracker: built from a `TrackedStage`, with the methods of the class `Tracker` below
    REQUIRES     : optional: {package: extra of llm3 that installs it}; looked for before any device work

`jsonl` and `tensorboard` are always written: an error there ends the run, and the method may not return before the disk
has the data. The config's `trackers` name others, which run on a thread of their own and cannot stop a run.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from llm3.report.matrix import metrics_of

# The groups of tags; a metric of none of them belongs to "train", as the loss and the objective's own.
GROUPS = {
    "optim": ("learning_rate", "gradient_norm", "skipped_steps", "new_levels"),
    "speed": (
        *("tokens_per_second", "flops_per_second", "hardware_flops_per_second", "mfu", "hfu"),
        *("data_wait", "step_seconds", "first_step_seconds"),
    ),
}
COSTS = ("tokens", "flops", "seconds", "trainable_params")  # of a row, next to its metrics


@dataclass(frozen=True)
class TrackedStage:
    """A stage whose training starts or resumes.

    directory: the stage's folder in the run directory. config: its hyperparameters, nested; {}: not known. resume_step:
    the step that it resumes from; None: it starts. lines: those of metrics.jsonl up to that step. samples: the lines of
    samples.jsonl up to it. say: prints a line for the user.
    """

    directory: Path
    config: dict[str, Any] = field(default_factory=dict)
    resume_step: int | None = None
    lines: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    say: Callable[[str], None] = print


class Tracker(Protocol):
    """Receives a stage's metrics in the order of steps. Only the first process has trackers."""

    def __init__(self, stage: TrackedStage): ...

    def metrics(self, step: int, line: dict[str, Any], group: str) -> None:
        """The metrics after a step, as JSON values; None: not finite. group: see `tags`."""

    def samples(self, step: int, samples: list[tuple[str, str]]) -> None:
        """Pairs of a prompt and the model's text after a step."""

    def result(self, step: int, row: dict[str, Any]) -> None:
        """The stage's finished row of the matrix, evaluated after its last step."""

    def close(self) -> None:
        """Nothing more follows in this session; without a `result`, the stage is not finished."""


def tags(line: dict[str, Any], group: str = "") -> dict[str, float]:
    """{tag: value} of the numbers of a line. group: that of all tags; "": of each metric, as in train/loss."""
    return {f"{group or group_of(key)}/{key}": value for key, value in numbers(line).items()}


def numbers(values: dict[str, Any]) -> dict[str, float]:
    """The numbers among some values."""
    return {
        key: value for key, value in values.items() if isinstance(value, int | float) and not isinstance(value, bool)
    }


def group_of(metric: str) -> str:
    """The group of a metric's tag."""
    return next((group for group, metrics in GROUPS.items() if metric in metrics), "train")


def group_of_line(line: dict[str, Any]) -> str:
    """The group of a line of metrics.jsonl: "eval" for an evaluation between steps, which has no loss of training."""
    return "" if "loss" in line else "eval"


def final_tags(row: dict[str, Any]) -> dict[str, float]:
    """{tag: value} of a row: the metrics that the matrix shows, and what the stage has cost."""
    return tags({key: row.get(key) for key in [*(metric.key for metric in metrics_of([row])), *COSTS]}, "final")

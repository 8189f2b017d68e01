"""The metrics of a stage: written to metrics.jsonl, TensorBoard and the config's trackers, and read back."""

import json
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

from llm3.errors import NotWritten, UserError, to_stderr, writing
from llm3.files import METRICS, SAMPLES
from llm3.report.background import Background
from llm3.report.trackers import TrackedStage, Tracker, jsonl, tensorboard
from llm3.report.units import plain


class MetricsWriter:
    """Appends JSON lines to DIR/metrics.jsonl, and the same scalars, in groups of tags, to TensorBoard and trackers.

    resume_step: the step that training resumes from. Lines of later steps, and an incomplete last line of a killed
    process, are dropped, so that no step occurs twice. None: start an empty file. config: the hyperparameters of the
    stage, nested. trackers: further ones, {name: class}; they run on threads of their own, and cannot fail the run.
    say: prints their messages. Raises NotWritten if the disk refuses.
    """

    def __init__(
        self,
        directory: Path | str,
        resume_step: int | None = None,
        config: dict[str, Any] | None = None,
        trackers: Mapping[str, type[Tracker]] | None = None,
        say: Callable[[str], None] = to_stderr,
    ):
        directory = Path(directory)
        self._path = directory / METRICS
        lines, samples = (
            [] if resume_step is None else [line for line in found if line["step"] <= resume_step]
            for found in (read_metrics(directory), read_json_lines(directory / SAMPLES))
        )
        for line in lost_lines(directory, lines, resume_step or 0):
            say(line)
        stage = TrackedStage(directory, config or {}, resume_step, lines, samples, say)
        with writing(self._path):
            self._trackers: list[Tracker | Background] = [jsonl.Tracker(stage), tensorboard.Tracker(stage)]
        for name, tracker in (trackers or {}).items():
            self._trackers.append(Background(partial(tracker, stage), name, say))

    def write(self, step: int, metrics: dict, group: str = "") -> None:
        """Append {"step": step, **metrics}. Numpy and jax scalars become numbers; NaN and inf become null.

        group: that of all the tags, such as "eval"; "": each tag has the group of its metric, as in train/loss. Raises
        NotWritten if the disk refuses.
        """
        line = {key: _finite(plain(value)) for key, value in metrics.items()}
        with writing(self._path):
            for each in self._trackers:
                each.metrics(int(step), line, group)

    def samples(self, step: int, samples: list[tuple[str, str]]) -> None:
        """Show pairs of a prompt and the model's text. Raises NotWritten if the disk refuses."""
        with writing(self._path):
            for each in self._trackers:
                each.samples(step, samples)

    def result(self, step: int, row: dict[str, Any]) -> None:
        """Show the finished row of a stage that ended at this step. Raises NotWritten if the disk refuses."""
        row = {key: _finite(plain(value)) for key, value in row.items()}
        with writing(self._path):
            for each in self._trackers:
                each.result(step, row)

    def close(self) -> None:
        """Close all trackers. Raises NotWritten if the disk refuses."""
        with writing(self._path), ExitStack() as closing:
            for each in self._trackers:
                closing.callback(each.close)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        with suppress(NotWritten) if kind else nullcontext():  # report the first error only
            self.close()


def read_metrics(directory: Path | str) -> list[dict]:
    """The lines of DIR/metrics.jsonl, as `read_json_lines`."""
    return read_json_lines(Path(directory) / METRICS)


def lost_lines(directory: Path, lines: list[dict], saved_step: int) -> list[str]:
    """A line if those of DIR/metrics.jsonl end before a saved step: each step is logged before it is saved."""
    if (last := max((line["step"] for line in lines), default=0)) >= saved_step:
        return []
    return [f"{directory / METRICS}: the lines after step {last}, up to step {saved_step}, are lost"]


def read_json_lines(path: Path) -> list[dict]:
    """The lines of a file, oldest first; empty if there is no file.

    An incomplete last line is dropped. Raises UserError for any other line that cannot be parsed.
    """
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    lines, metrics = text.splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            metrics.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines) and not text.endswith("\n"):
                break
            raise UserError(f"{path}:{number}: expected a line of JSON, found {line[:40]!r}") from error
    return metrics


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value

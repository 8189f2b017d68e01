"""The metrics of a stage on disk: metrics.jsonl and TensorBoard event files in the same folder."""

import json
import math
import time
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from llm3.errors import NotWritten, UserError, writing
from llm3.files import METRICS, write_atomic
from llm3.report.units import plain

# The groups of tags in TensorBoard; a metric of none of them belongs to "train", as the loss and the objective's own.
GROUPS = {
    "optim": ("learning_rate", "gradient_norm", "skipped_steps", "new_levels"),
    "speed": (
        *("tokens_per_second", "flops_per_second", "hardware_flops_per_second", "mfu", "hfu"),
        *("data_wait", "step_seconds"),
    ),
}


class MetricsWriter:
    """Appends JSON lines to DIR/metrics.jsonl, and the same scalars, in groups of tags, to TensorBoard.

    resume_step: the step that training resumes from. Lines of later steps, and an incomplete last line of a killed
    process, are dropped, so that no step occurs twice. None: start an empty file.
    """

    def __init__(self, directory: Path | str, resume_step: int | None = None):
        directory = Path(directory)
        self._path = directory / METRICS
        kept = [] if resume_step is None else [line for line in read_metrics(directory) if line["step"] <= resume_step]
        with writing(self._path):
            write_atomic(self._path, "".join(f"{json.dumps(line)}\n" for line in kept))
            if resume_step is None:
                for events in directory.glob("events.out.tfevents.*"):
                    events.unlink()
            self._file = self._path.open("a", encoding="utf-8")
            self._board = _Board(directory, None if resume_step is None else resume_step + 1)

    def write(self, step: int, metrics: dict, group: str = "") -> None:
        """Append {"step": step, **metrics}. Numpy and jax scalars become numbers; NaN and inf become null.

        group: that of all the tags, such as "eval"; "": each tag has the group of its metric, as in train/loss. Raises
        NotWritten if the disk refuses.
        """
        line = {"step": int(step), **{key: _finite(plain(value)) for key, value in metrics.items()}}
        with writing(self._path):
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
            numbers = {key: value for key, value in line.items() if isinstance(value, int | float) and key != "step"}
            tags = {f"{group or group_of(key)}/{key}": value for key, value in numbers.items()}
            self._board.write(line["step"], tags)

    def text(self, step: int, tag: str, text: str) -> None:
        """Add a text, in Markdown, to TensorBoard. Raises NotWritten if the disk refuses."""
        with writing(self._path):
            self._board.text(step, tag, text)

    def hyperparameters(self, config: dict, metrics: Iterable[str] = ()) -> None:
        """Add a config to TensorBoard: as a text, and its values, by names like optimizer.ema, as hyperparameters.

        metrics: the tags by which runs are compared. Raises NotWritten if the disk refuses.
        """
        with writing(self._path):
            self._board.text(0, "config", f"```json\n{json.dumps(config, indent=2)}\n```")
            self._board.hyperparameters(flat(config), list(metrics))

    def close(self) -> None:
        """Close both files. Raises NotWritten if the disk refuses."""
        with writing(self._path):
            try:
                self._file.close()
            finally:
                self._board.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        with suppress(NotWritten) if kind else nullcontext():  # report the first error only
            self.close()


def group_of(metric: str) -> str:
    """The group of a metric's tag."""
    return next((group for group, metrics in GROUPS.items() if metric in metrics), "train")


def flat(config: dict, prefix: str = "") -> dict[str, str | bool | float]:
    """The values of a nested config by path; a list is a text, and what is not set is left out."""
    found: dict[str, str | bool | float] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        elif value is not None:
            found[f"{prefix}{key}"] = value if isinstance(value, str | bool | int | float) else json.dumps(value)
    return found


class _Board:
    """A file of TensorBoard events. Its first event voids earlier events of `purge_step` and later steps.

    The writer of tensorboardX is not used: its thread dies when the disk is full, and later writes wait forever.
    """

    def __init__(self, directory: Path, purge_step: int | None):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._file = EventsWriter(str(directory / "events"))
        if purge_step is not None:
            started = SessionLog(status=SessionLog.START)
            self._file.write_event(Event(wall_time=time.time(), step=purge_step, session_log=started))
        self._file.flush()

    def write(self, step: int, numbers: dict[str, float]) -> None:
        from tensorboardX.summary import scalar

        self._add(step, [scalar(name, value) for name, value in numbers.items()])

    def text(self, step: int, tag: str, text: str) -> None:
        from tensorboardX.summary import text as summary

        self._add(step, [summary(tag, text)])

    def hyperparameters(self, values: dict[str, str | bool | float], metrics: list[str]) -> None:
        from tensorboardX.summary import hparams

        experiment, start, _ = hparams(values, dict.fromkeys(metrics, 0.0))
        self._add(0, [experiment, start])

    def _add(self, step: int, summaries: Iterable[Any]) -> None:
        from tensorboardX.proto.event_pb2 import Event

        for summary in summaries:
            self._file.write_event(Event(wall_time=time.time(), step=step, summary=summary))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(directory: Path | str) -> list[dict]:
    """The lines of DIR/metrics.jsonl, as `read_json_lines`."""
    return read_json_lines(Path(directory) / METRICS)


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

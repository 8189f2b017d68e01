"""The metrics of a stage on disk: metrics.jsonl and TensorBoard event files in the same folder."""

import json
import math
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from llm3.errors import NotWritten, UserError, writing
from llm3.files import METRICS, write_atomic
from llm3.report.units import plain


class MetricsWriter:
    """Appends one JSON line per step to DIR/metrics.jsonl, and the same scalars to TensorBoard.

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

    def write(self, step: int, metrics: dict) -> None:
        """Append {"step": step, **metrics}. Numpy and jax scalars become numbers; NaN and inf become null.

        Raises NotWritten if the disk refuses.
        """
        line = {"step": int(step), **{key: _finite(plain(value)) for key, value in metrics.items()}}
        with writing(self._path):
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
            numbers = {key: value for key, value in line.items() if isinstance(value, int | float)}
            self._board.write(line["step"], {key: value for key, value in numbers.items() if key != "step"})

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
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        for name, value in numbers.items():
            self._file.write_event(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(directory: Path | str) -> list[dict]:
    """The lines of DIR/metrics.jsonl, oldest first; empty if there is no file.

    An incomplete last line is dropped. Raises UserError for any other line that cannot be parsed.
    """
    path = Path(directory) / METRICS
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

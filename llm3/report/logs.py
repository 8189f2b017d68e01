"""The metrics of a stage on disk: metrics.jsonl, and TensorBoard event files beside it."""

import json
import math
import time
from contextlib import nullcontext, suppress
from pathlib import Path

from llm3.errors import NotWritten, UserError, writing
from llm3.files import METRICS, write_atomic
from llm3.report.units import plain


class MetricsWriter:
    """Appends one line of JSON a step to DIR/metrics.jsonl, and the same scalars to TensorBoard.

    `resume_step` is the step that training continues from: lines of later steps, and a last line that was cut short
    when the process was killed, are dropped, so that no step is in the file twice. None starts the file anew.
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
        """Append {"step": step, **metrics}. Scalars of numpy and jax are numbers; NaN and inf are null.

        Raises NotWritten where the disk refuses.
        """
        line = {"step": int(step), **{key: _finite(plain(value)) for key, value in metrics.items()}}
        with writing(self._path):
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
            numbers = {key: value for key, value in line.items() if isinstance(value, int | float)}
            self._board.write(line["step"], {key: value for key, value in numbers.items() if key != "step"})

    def close(self) -> None:
        """Close both files. Raises NotWritten where the disk refuses."""
        with writing(self._path):
            try:
                self._file.close()
            finally:
                self._board.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        with suppress(NotWritten) if kind else nullcontext():  # the first error is the one to be told
            self.close()


class _Board:
    """A file of TensorBoard events. The first one says that what was written of `purge_step` and later is void.

    tensorboardX's own writer has a thread, which ends where the disk is full: then whoever writes waits for ever.
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
    """The lines of DIR/metrics.jsonl, oldest first; none where there is no file.

    A last line that was cut short is left out. Raises UserError for any other line that cannot be read.
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


def _finite(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""The metrics of a stage on disk: metrics.jsonl, and TensorBoard event files beside it."""

import json
import math
import os
from pathlib import Path

from llm3.errors import UserError
from llm3.report.units import plain

FILE_NAME = "metrics.jsonl"


class MetricsWriter:
    """Appends one line of JSON a step to DIR/metrics.jsonl, and the same scalars to TensorBoard.

    `resume_step` is the step that training continues from: lines of later steps, and a last line that was cut short
    when the process was killed, are dropped, so that no step is in the file twice. None starts the file anew.
    """

    def __init__(self, directory: Path | str, resume_step: int | None = None):
        from tensorboardX import SummaryWriter

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / FILE_NAME
        kept = [] if resume_step is None else [line for line in read_metrics(directory) if line["step"] <= resume_step]
        partial = path.with_name(f"{FILE_NAME}.partial")
        partial.write_text("".join(f"{json.dumps(line)}\n" for line in kept), encoding="utf-8")
        os.replace(partial, path)
        if resume_step is None:
            for events in directory.glob("events.out.tfevents.*"):
                events.unlink()
        self._file = path.open("a", encoding="utf-8")
        purge_step = None if resume_step is None else resume_step + 1
        self._board = SummaryWriter(str(directory), purge_step=purge_step, flush_secs=10)

    def write(self, step: int, metrics: dict) -> None:
        """Append {"step": step, **metrics} and flush. Scalars of numpy and jax are numbers; NaN and inf are null."""
        line = {"step": int(step), **{key: _finite(plain(value)) for key, value in metrics.items()}}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        for key, value in line.items():
            if key != "step" and isinstance(value, int | float):
                self._board.add_scalar(key, value, step)

    def close(self) -> None:
        """Flush and close both files."""
        self._file.close()
        self._board.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(directory: Path | str) -> list[dict]:
    """The lines of DIR/metrics.jsonl, oldest first; none where there is no file.

    A last line that was cut short is left out. Raises UserError for any other line that cannot be read.
    """
    path = Path(directory) / FILE_NAME
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

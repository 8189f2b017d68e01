"""DIR/metrics.jsonl: a line of JSON for each write. The stage's row and samples have files of their own."""

import json
from typing import Any

from llm3.files import METRICS, write_atomic
from llm3.report.trackers import TrackedStage


class Tracker:
    """Begins with the lines up to the step that the stage resumes from. Raises OSError if the disk refuses."""

    def __init__(self, stage: TrackedStage):
        path = stage.directory / METRICS
        kept = "".join(f"{json.dumps(line)}\n" for line in stage.lines)
        if not path.is_file() or path.read_bytes() != kept.encode():
            write_atomic(path, kept)
        self._file = path.open("a", encoding="utf-8")

    def metrics(self, step: int, line: dict[str, Any], group: str) -> None:
        self._file.write(json.dumps({"step": step, **line}, allow_nan=False) + "\n")
        self._file.flush()

    def samples(self, step: int, samples: list[tuple[str, str]]) -> None:
        pass

    def result(self, step: int, row: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        self._file.close()

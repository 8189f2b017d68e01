"""TensorBoard event files in the stage's folder: a stage is a run of TensorBoard and a session of its HParams tab.

There is no event that describes the experiment: TensorBoard would take the first stage's for all stages. Without one,
the HParams tab has the hyperparameters and the metrics of all stages.
"""

import json
import time
from collections.abc import Iterable
from typing import Any

from llm3.report.trackers import TrackedStage, final_tags, tags


class Tracker:
    """One event file a session. Its first event voids earlier events after the step that the stage resumes from.

    The writer of tensorboardX is not used: its thread dies when the disk is full, and later writes wait forever. Raises
    OSError if the disk refuses.
    """

    def __init__(self, stage: TrackedStage):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        before = list(stage.directory.glob("events.out.tfevents.*"))
        if stage.resume_step is None:
            for events in before:
                events.unlink()
        # the names end with a number, since two sessions may begin in the same second
        self._file = EventsWriter(str(stage.directory / "events"), f".{len(before)}")
        self._config = stage.config
        if stage.resume_step is not None:
            started = SessionLog(status=SessionLog.START)
            step = stage.resume_step + 1
            self._file.write_event(Event(wall_time=time.time(), step=step, session_log=started))
        self._file.flush()
        if stage.resume_step is None and stage.config:
            self._start_session(stage.config)

    def metrics(self, step: int, line: dict[str, Any], group: str) -> None:
        self._scalars(step, tags(line, group))

    def samples(self, step: int, samples: list[tuple[str, str]]) -> None:
        self._text(step, "samples", "\n\n---\n\n".join(f"**{prompt}**\n\n{text}" for prompt, text in samples))

    def result(self, step: int, row: dict[str, Any]) -> None:
        from tensorboardX.summary import hparams

        self._scalars(step, final_tags(row))
        if self._config:
            *_, end = hparams({}, {})
            self._add(step, [end])

    def close(self) -> None:
        self._file.close()

    def _start_session(self, config: dict[str, Any]) -> None:
        from tensorboardX.summary import hparams

        self._text(0, "config", f"```json\n{json.dumps(config, indent=2)}\n```")
        _, start, _ = hparams(flat(config), {})
        self._add(0, [start])

    def _scalars(self, step: int, values: dict[str, float]) -> None:
        from tensorboardX.summary import scalar

        self._add(step, [scalar(name, value) for name, value in values.items()])

    def _text(self, step: int, tag: str, text: str) -> None:
        from tensorboardX.summary import text as summary

        self._add(step, [summary(tag, text)])

    def _add(self, step: int, summaries: Iterable[Any]) -> None:
        from tensorboardX.proto.event_pb2 import Event

        for summary in summaries:
            self._file.write_event(Event(wall_time=time.time(), step=step, summary=summary))
        self._file.flush()


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, str | bool | float]:
    """The values of a nested config by path; a list is a text, and what is not set is left out."""
    found: dict[str, str | bool | float] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        elif value is not None:
            found[f"{prefix}{key}"] = value if isinstance(value, str | bool | int | float) else json.dumps(value)
    return found

"""Weights & Biases: a run for each stage, in a group for each run directory.

The id of the run is kept in the stage's folder, and a stage that resumes goes on with that run. It first sends again
what metrics.jsonl and samples.jsonl hold: wandb itself drops the steps that its server has, and gets those that were
lost with a dead process or without a network. Offline, there is no server, so each session's copy on disk holds the
whole stage and replaces that of the session before.

WANDB_MODE, WANDB_PROJECT (default: llm3), WANDB_ENTITY, WANDB_RUN_GROUP and WANDB_DIR mean what they always do.
"""

import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm3.files import read_json, write_json
from llm3.report.trackers import TrackedStage, group_of_line, numbers, tags

REQUIRES = {"wandb": "wandb"}
ID = "wandb.json"  # in the stage's folder: {"id"}
INIT_SECONDS, FINISH_SECONDS = 15, 10  # for an answer of the server; and to upload the rest at the end of a stage


class Tracker:
    """Sends to a server, or with WANDB_MODE=offline, or if there is none, writes what `wandb sync` uploads later."""

    def __init__(self, stage: TrackedStage):
        import wandb

        self._library, self._stage, self._finished = wandb, stage, False
        self._run = self._begin(run_id(stage))
        for step, line, samples in history(stage):
            if line is not None:
                self.metrics(step, line, group_of_line(line))
            else:
                self.samples(step, samples)

    def _begin(self, name: str) -> Any:
        stage, wandb = self._stage, self._library
        directory = Path(os.environ.get("WANDB_DIR") or stage.directory)
        quiet = wandb.Settings(silent=True)  # its lines would cut into the progress line; the important ones follow
        mode = wandb.setup(quiet).settings.mode
        if mode not in ("offline", "disabled") and not wandb.login(prompt=False, verify=False):
            stage.say("wandb: no API key is known (`wandb login` asks for one), so it works offline")
            mode = "offline"
        folder = stage.directory.resolve()
        arguments = {
            "project": os.environ.get("WANDB_PROJECT") or "llm3",
            "group": os.environ.get("WANDB_RUN_GROUP") or folder.parent.name,
            "job_type": os.environ.get("WANDB_JOB_TYPE") or folder.name,
            "name": os.environ.get("WANDB_NAME") or f"{folder.parent.name}/{folder.name}",
            "config": stage.config,
            "id": name,
            "resume": "allow",
            "reinit": "create_new",  # not the run of the stage before, if that is still being uploaded
            "dir": str(directory),
            "settings": wandb.Settings(
                console="off",
                silent=True,
                init_timeout=INIT_SECONDS,
                finish_timeout=FINISH_SECONDS,
                finish_timeout_raises=True,
            ),
        }
        before = list((directory / "wandb").glob(f"offline-run-*-{name}"))
        try:
            run = wandb.init(mode=mode, **arguments)
        except Exception as error:
            if mode in ("offline", "disabled"):
                raise
            stage.say(f"wandb: the server cannot be used, so it works offline: {' '.join(str(error).split())[:200]}")
            wandb.teardown()  # it holds on to the id
            run = wandb.init(mode="offline", **arguments)
        if run.settings.mode == "offline":
            for earlier in before:
                shutil.rmtree(earlier, ignore_errors=True)
            stage.say(f"wandb: offline: `wandb sync {run.settings.sync_dir}` uploads it")
        elif run.url:
            stage.say(f"wandb: {run.url}")
        return run

    def metrics(self, step: int, line: dict[str, Any], group: str) -> None:
        self._run.log(tags(line, group), step=step)

    def samples(self, step: int, samples: list[tuple[str, str]]) -> None:
        table = self._library.Table(columns=["prompt", "text"], data=[list(pair) for pair in samples])
        self._run.log({"samples": table}, step=step)

    def result(self, step: int, row: dict[str, Any]) -> None:
        self._run.summary.update({f"final/{key}": value for key, value in numbers(row).items()})
        self._finished = True

    def close(self) -> None:
        try:
            self._run.finish(exit_code=0 if self._finished else 1)
        except TimeoutError:
            self._stage.say(f"wandb: not all is uploaded: `wandb sync {self._run.settings.sync_dir}` does the rest")


def run_id(stage: TrackedStage) -> str:
    """The id of the stage's run: that of the sessions before, or a new one, which is kept."""
    path = stage.directory / ID
    kept = read_json(path) if stage.resume_step is not None else None
    if kept is None:
        kept = {"id": secrets.token_hex(6)}
        write_json(path, kept)
    return kept["id"]


def history(stage: TrackedStage) -> Iterator[tuple[int, dict[str, Any] | None, list[tuple[str, str]]]]:
    """(step, metrics or None, samples) of the sessions before, in the order of steps."""
    found: list[tuple[int, dict[str, Any] | None, list[tuple[str, str]]]] = [
        (line["step"], {key: value for key, value in line.items() if key != "step"}, []) for line in stage.lines
    ]
    for step in dict.fromkeys(line["step"] for line in stage.samples):
        found.append((step, None, [(line["prompt"], line["text"]) for line in stage.samples if line["step"] == step]))
    yield from sorted(found, key=lambda each: each[0])

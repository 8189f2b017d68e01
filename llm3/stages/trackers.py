"""The trackers that a config names: checked before any device work, and opened for a stage."""

from collections.abc import Callable
from pathlib import Path

from llm3.config.schema import RunConfig, as_dict
from llm3.registry import check_installed, check_known, declared, load_plugin
from llm3.report import trackers
from llm3.report.logs import MetricsWriter

FOLDER = "report/trackers"
ALWAYS = ("jsonl", "tensorboard")


def check_trackers(config: RunConfig) -> None:
    """Raise UserError for a tracker that does not exist, or whose library is not installed."""
    for name in config.trackers:
        check_known(FOLDER, name, "config.trackers")
        check_installed(declared(FOLDER, name), "config.trackers")


def open_writer(
    config: RunConfig, workdir: Path, stage: str, resume_step: int | None, say: Callable[[str], None]
) -> MetricsWriter:
    """The writer of a stage's metrics, with the config's trackers. Only the first process may open it.

    resume_step: None if the stage starts. say: prints a line for the user. Raises NotWritten if the disk refuses.
    """
    plugins = {name: load_plugin(trackers, name) for name in config.trackers if name not in ALWAYS}
    others = {name: getattr(each, "Tracker", each) for name, each in plugins.items()}  # an import path names the class
    return MetricsWriter(workdir / stage, resume_step, as_dict(config.stages[stage]), others, say)

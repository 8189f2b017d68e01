"""The stages that a workdir holds and that another config than this one has, for a report of all of them."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from llm3.config.load import read_as
from llm3.config.schema import RunConfig, StageConfig
from llm3.errors import UserError
from llm3.files import RECORD, ROW, read_json
from llm3.stages.parents import first_rows
from llm3.stages.rules import parents_first


def with_stages_beside(config: RunConfig, workdir: Path) -> RunConfig:
    """A config with the finished stages of a workdir that it lacks, after its own; each has the fields of its record.

    A stage whose record cannot be read, or that no config could have beside these, is left out.
    """
    for name, stage in _finished(workdir):
        if name not in config.stages:
            more = replace(config, stages=config.stages | {name: stage})
            with suppress(UserError, KeyError):  # KeyError: its parent is no stage of the config
                first_rows(more, workdir), parents_first(more.stages)
                config = more
    return config


def _finished(workdir: Path) -> Iterator[tuple[str, StageConfig]]:
    """The finished stages in the order in which they were finished, which is parents first."""
    paths = [path for path in workdir.glob(f"*/{ROW}") if (path.parent / RECORD).is_file()]
    for path in sorted(paths, key=lambda path: (path.stat().st_mtime, path)):
        name = path.parent.name
        with suppress(UserError, KeyError, TypeError):
            if read_json(path)["stage"] == name:  # else it is a copy
                yield name, read_as(StageConfig, read_json(path.parent / RECORD)["stage"])

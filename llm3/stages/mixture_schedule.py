"""The weights of a stage's sources over its steps, with the data of its parent that it replays."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm3.config.schema import RunConfig, StageConfig
from llm3.data.library import Library
from llm3.data.mixture import Schedule
from llm3.data.mixture_weights import weight_schedule
from llm3.errors import UserError
from llm3.files import RECORD
from llm3.remote import workdir_path
from llm3.stages.amendments import REPLAYED
from llm3.stages.parents import parent_name
from llm3.stages.records import read_record
from llm3.stages.rules import data_sources


def stage_schedule(config: RunConfig, name: str, library: Library) -> Schedule:
    """Pairs (first step, weights of the sources), as `weight_schedule`. Raises UserError."""
    stage, where = config.stages[name], f"config.stages.{name}"
    return _schedule(vars(stage), replayed_weights(config, stage, library, where), library, where)


def schedule_of_history(
    config: RunConfig,
    name: str,
    library: Library,
    history: Sequence[tuple[int, StageConfig]],
    replayed: Mapping[str, float] | None = None,
) -> Schedule:
    """The schedule of a stage whose config has changed: that of each config from its first step on.

    history: of a `Stage`. replayed: the weights that the stage replays; None: those of its parent now. While the
    weights stay as they are, so does the order of the data. Raises UserError.
    """
    where, found, before = f"config.stages.{name}", Schedule(), Schedule()
    for first, own in history:
        parent = replayed or replayed_weights(config, own, library, where)
        now = _schedule(vars(own), parent if own.replay else None, library, where)
        if now == before:
            continue
        in_force = [weights for step, weights in now if step <= first][-1]
        later = [(step, weights) for step, weights in now if step > first]
        found, before = [*(each for each in found if each[0] < first), (first, in_force), *later], now
    return found


def drawn_sources(config: RunConfig, name: str, schedule: Schedule) -> list[str]:
    """The sources that a stage draws from, its own first. schedule: that of the stage."""
    return list(dict.fromkeys([*data_sources(config, name), *(each for _, weights in schedule for each in weights)]))


def replayed_weights(config: RunConfig, stage: StageConfig, library: Library, where: str) -> dict[str, float] | None:
    """The weights of the parent's sources to replay; None without replay or without a trained parent."""
    if not stage.replay:
        return None
    if (parent := parent_name(stage)) in config.stages:
        return stage_schedule(config, parent, library)[-1][1]
    if not (isinstance(stage.start, dict) and stage.start.get("run")):
        return None
    run = workdir_path(stage.start["run"], f"{where}.start.run")
    return _recorded(run, stage.start["stage"], library, f"{where}.replay")


def _recorded(run: Path, name: str, library: Library, where: str) -> dict[str, float]:
    """The weights in the last step of a stage of another run, by the record that it keeps."""
    path = run / name / RECORD
    if (record := read_record(run, name)) is None:
        raise UserError(
            f"{where}: {path}, which names the data to replay, does not exist: if that run was moved, set start.run to "
            "its new place"
        )
    own, parent = {"temperature": 0.0, "data_schedule": (), "replay": 0.0} | record["stage"], None
    if own["replay"] and REPLAYED in record:
        parent = record[REPLAYED]
    elif own["replay"] and (start := own["start"]) is not None:
        start = start if isinstance(start, dict) else {"stage": start}
        parent = _recorded(Path(start.get("run") or run), start["stage"], library, where)
    return _schedule(own, parent, library, where)[-1][1]


def _schedule(own: Mapping[str, Any], parent: Mapping[str, float] | None, library: Library, where: str) -> Schedule:
    """The schedule of a stage with these fields. parent: the weights that it replays."""
    weights = [own["data"], *(each for _, each in own["data_schedule"]), parent or {}]
    sources = dict.fromkeys(source for each in weights for source in each)
    for source in sources:
        if source not in library.configs:
            which = "parent's source" if source in (parent or {}) else "source that was drawn from before,"
            raise UserError(f"{where}: the {which} {source!r} is not in config.sources")
    return weight_schedule(
        **{key: own[key] for key in ("data", "temperature", "data_schedule", "replay", "steps")},
        parent=parent,
        tokens={source: library.cache(source, "train").tokens for source in sources},
        where=where,
    )

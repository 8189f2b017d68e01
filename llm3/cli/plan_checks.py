"""What `run` would refuse before it trains, found by `plan`: all stages at once, and nothing is written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm3.config.schema import RunConfig
from llm3.errors import UserError, together
from llm3.files import CHECKPOINTS, ROW
from llm3.handoff.start import AnyStart, ModelStart, Start, read_start
from llm3.interop.hub import weights_are_here
from llm3.planning.fit import check_fits
from llm3.stages.ancestry import check_ancestry
from llm3.stages.parents import first_rows
from llm3.stages.run_stage import check_before_training
from llm3.stages.session import Session
from llm3.stages.stage import Stage
from llm3.stages.start import check_own_parent, locate_parent
from llm3.stages.workdir import check_record


class Refusals(list[UserError]):
    """The errors that `run` would end with, and notes on what was not checked."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def attempt(self, check: Callable[..., Any], *arguments: Any) -> None:
        """Keep the UserError that a check raises."""
        try:
            check(*arguments)
        except UserError as error:
            if str(error) not in map(str, self):
                self.append(error)


def refused(errors: list[UserError]) -> UserError:
    """What `run` would end with."""
    one = together(errors)
    return type(one)(f"`run` would refuse this config:\n{one}")


def to_train(workdir: Path, order: list[str]) -> list[str]:
    """The stages that `run` would train there."""
    return [name for name in order if not (workdir / name / ROW).is_file()]


def with_parents(config: RunConfig, workdir: Path, names: list[str], found: Refusals) -> list[str]:
    """The stages whose parents can be looked at; a model of others, or a stage that was not run yet, is noted."""
    kept = []
    for name in names:
        start = _start(config, workdir, name)
        if isinstance(start, Start) and start.stage not in names and _is_to_come(config, workdir, start):
            found.notes.append(f"{name}: hand-off not checked: {start.stage} has to be trained first")
        elif isinstance(start, ModelStart) and not weights_are_here(start.model, start.revision):
            found.notes.append(f"{name}: hand-off not checked: the weights of {start.model} are not on this machine")
        else:
            kept.append(name)
    return kept


def check_parents(config: RunConfig, workdir: Path, order: list[str], found: Refusals) -> None:
    """Check the workdir and the parents, without data."""
    for name in [*first_rows(config, workdir), *order]:
        found.attempt(check_record, workdir, config, name)
    found.attempt(check_ancestry, config, workdir, order)
    names = to_train(workdir, order)
    looked_at = with_parents(config, workdir, names, found)
    for name in looked_at:
        found.attempt(locate_parent, config, workdir, name, names)
    new = [name for name in names if not (workdir / name / CHECKPOINTS).is_dir()]
    found.attempt(check_fits, config, new)


def check_handoffs(session: Session, order: list[str], found: Refusals) -> None:
    """Check all stages with their data: leaves, tokenizers, labels, digests and the train step."""
    names = to_train(session.workdir, order)
    for name in with_parents(session.config, session.workdir, names, Refusals()):
        found.attempt(check_before_training, session, session.experiment.stages[name], names)


def check_leaves(stages: dict[str, Stage], found: Refusals) -> None:
    """Check the leaves of stages that start from one of these, without data."""
    for stage in stages.values():
        found.attempt(check_own_parent, stages, stage)


def _is_to_come(config: RunConfig, workdir: Path, start: Start) -> bool:
    """Whether a parent is a stage of this config that is not trained in the workdir yet."""
    own = start.run.resolve() == workdir.resolve() and start.stage in config.stages
    return own and not (workdir / start.stage / CHECKPOINTS).is_dir()


def _start(config: RunConfig, workdir: Path, name: str) -> AnyStart | None:
    return read_start(config.stages[name].start, workdir, f"config.stages.{name}.start")

"""Changes a stage that has begun: checks an amendment of its config, and writes it into the workdir.

An amendment takes effect at the step where the stage resumes: its newest checkpoint, or the earlier one that it goes
back to. What comes after that is set aside.
"""

import shutil
from contextlib import nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path

from llm3.checkpoints import commit
from llm3.checkpoints.commit import saved_steps
from llm3.config.changes import Change
from llm3.config.schema import RunConfig
from llm3.errors import UserError, writing
from llm3.files import CHECKPOINTS, METRICS, RECORD, ROW, SAMPLES, SET_ASIDE
from llm3.stages.amendments import DERIVED, Amendment, amendments_in, changed, with_amendments
from llm3.stages.parents import parent_name
from llm3.stages.records import read_amendments, read_record, write_record
from llm3.stages.workdir import another_config, record_changes, stage_record


def planned(
    workdir: Path, config: RunConfig, name: str, why: str = "", from_step: int | None = None
) -> Amendment | None:
    """The amendment of a stage that this config asks for; None if it resumes unchanged, or has not begun.

    why: the reason that the user gives. from_step: the step to go back to. The same command again, as a scheduler gives
    it, amends nothing. Raises UserError for a config that differs without a reason, or in a fixed field, for a step
    that is not kept, and for an amendment that leaves nothing to train. Writes nothing.
    """
    steps, earlier = saved_steps(workdir / name / CHECKPOINTS), read_amendments(workdir, name)
    newest = max(steps, default=0)
    if from_step is not None:
        last = earlier[-1] if earlier else None
        same = last and (last.back_from is not None, last.step, last.why) == (True, from_step, why)
        if same and not record_changes(workdir, config, name):
            return None
        if from_step not in steps:
            held = ", ".join(map(str, steps)) or "none"
            raise UserError(f"--from_step={from_step}: {workdir / name / CHECKPOINTS} holds the steps {held}")
    # a checkpoint may have been lost since the stage was amended after it
    step = max([newest, *(each.step for each in earlier)]) if from_step is None else from_step
    found = record_changes(workdir, config, name, step)
    if not found and (from_step is None or step == newest):
        return None
    if any(each.kind == "fixed" for each in found) or (found and not why):
        raise another_config(workdir, name, found)
    if not why:
        raise UserError(f'--from_step={from_step}: the record keeps the reason: expected --amend="WHY" with it')
    check_amendment(config, name, step, found)
    when = datetime.now(UTC).isoformat(timespec="seconds")
    return Amendment(step, why, when, changed(found), None if from_step is None else newest)


def check_amendment(config: RunConfig, name: str, step: int, found: list[Change]) -> None:
    """Raise UserError for an amendment after a step that does nothing, or that the steps before it contradict."""
    stage, where = config.stages[name], f"config.stages.{name}"
    if stage.steps <= step:
        raise UserError(
            f"{where}.steps={stage.steps}: an amendment takes effect after step {step}: expected more steps, which are "
            "trained with it, or --from_step=K to go back"
        )
    changes = {each.field: each for each in found}
    if skips := changes.get("stage.skip_steps"):
        for first, last in (each for each in [*(skips.saved or []), *(skips.now or [])]):
            both = [first, last] in (skips.saved or []) and [first, last] in (skips.now or [])
            if first <= step and not both:
                raise UserError(
                    f"{where}.skip_steps: {[first, last]}: step {first} is trained already: expected steps after "
                    f"{step}, or --from_step=K with K below {first}"
                )
    data = changes.get("stage.data")
    tokenized = stage.kind == "pretrain" and not (config.tokenizer.path or config.tokenizer.sources)
    if data and tokenized and {*data.saved} != {*data.now}:
        raise UserError(
            f"{where}.data: the tokenizer is trained on these sources: expected the sources "
            f"{', '.join(data.saved)}, with any weights"
        )


def stage_to_go_back(workdir: Path, order: list[str], from_step: int | None) -> str | None:
    """The stage that `--from_step` is about: the only one of this command that has begun. Raises UserError."""
    if from_step is None:
        return None
    begun = [name for name in order if saved_steps(workdir / name / CHECKPOINTS)]
    if len(begun) != 1:
        which = f"{', '.join(begun)} have" if begun else "no stage of this command has"
        raise UserError(f"--from_step={from_step}: {which} checkpoints: expected --stages=NAME of the stage to go back")
    return begun[0]


def check_children(workdir: Path, config: RunConfig, amended: list[str], order: list[str]) -> None:
    """Raise UserError if a stage of this command was trained from a stage that would change."""
    for name in order:
        parent = parent_name(config.stages[name])
        if parent in amended and saved_steps(workdir / name / CHECKPOINTS):
            raise UserError(
                f"{workdir / name} was trained from {parent!r} as it is without this amendment: move it away to train "
                f"it again, or amend {parent!r} alone, with --stages={parent}"
            )


def apply(workdir: Path, config: RunConfig, amendments: dict[str, Amendment]) -> None:
    """Write amendments into the records of their stages. Raises UserError, and then has written nothing.

    A stage that was finished is no longer; its row is set aside. Killed in the middle, it can be called again.
    """
    for name, amendment in amendments.items():
        _check_continues(workdir, name, amendment)
    for name, amendment in amendments.items():
        directory, step = workdir / name, amendment.step
        later = [each for each in saved_steps(directory / CHECKPOINTS) if each > step]
        if later or (directory / ROW).is_file():  # a stage with a row counts as finished
            _set_aside(directory, later, new_folder(directory))
        before = read_record(workdir, name) or {}
        record = stage_record(config, name) | {key: before[key] for key in DERIVED if key in before}
        kept = [each for each in amendments_in(before) if each.step <= step]
        write_record(workdir, name, with_amendments(record, [*kept, amendment]))


def _set_aside(directory: Path, steps: list[int], folder: Path) -> None:
    """Move the row and the checkpoints of these steps to a folder, with copies of what they belong to."""
    with writing(folder):
        for name in (RECORD, METRICS, SAMPLES):
            if (directory / name).is_file():
                shutil.copyfile(directory / name, folder / name)
        if (directory / ROW).is_file():
            (directory / ROW).rename(folder / ROW)
        (folder / CHECKPOINTS).mkdir()
        for step in reversed(steps):
            commit.rename(directory / CHECKPOINTS / str(step), folder / CHECKPOINTS / str(step))


def new_folder(directory: Path) -> Path:
    """A new numbered folder for what a change replaces in the folder of a stage."""
    number = 1 + max((int(each.name) for each in (directory / SET_ASIDE).glob("[0-9]*")), default=0)
    folder = directory / SET_ASIDE / str(number)
    with writing(folder):
        folder.mkdir(parents=True)
    return folder


def _check_continues(workdir: Path, name: str, amendment: Amendment) -> None:
    """Raise UserError if the last checkpoint does not hold the parameters after its last step."""
    # these import jax, which takes seconds
    from llm3.checkpoints.orbax_store import DamagedCheckpoint
    from llm3.checkpoints.stage_checkpoints import Checkpoints

    ended, checkpoints = None, Checkpoints(workdir / name / CHECKPOINTS, read_only=True)
    # a damaged newest checkpoint is left to the run, which resumes from the one before it
    with nullcontext() if amendment.back_from is not None else suppress(DamagedCheckpoint):
        ended = amendment.step and checkpoints.meta(amendment.step).get("early_stopping")
    if ended and ended["result_step"] != amendment.step:
        raise UserError(
            f"{workdir / name} ended with the parameters of step {ended['result_step']}, so that step "
            f"{amendment.step} cannot be continued: go back with --from_step, or add a stage that starts from it"
        )

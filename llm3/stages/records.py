"""The record of a stage, `config.json`: the part of its config that decides its result, and its amendments.

It is derived: the metadata of each checkpoint holds it too, as it was then.
"""

from contextlib import suppress
from pathlib import Path

from llm3.checkpoints.commit import saved_steps
from llm3.errors import UserError
from llm3.files import CHECKPOINTS, FORMAT, RECORD, check_format, read_json, write_json
from llm3.stages.amendments import Amendment, amendments_in


def read_record(workdir: Path, name: str) -> dict | None:
    """The record of a stage; without a readable file that of its newest readable checkpoint; None without either.

    Raises UserError for one of a newer llm3.
    """
    record = None
    with suppress(UserError):
        record = read_json(workdir / name / RECORD)
    if not isinstance(record, dict):
        return _from_checkpoints(workdir, name)
    check_format(record, workdir / name / RECORD)
    return {key: value for key, value in record.items() if key != "format"}


def write_record(workdir: Path, name: str, record: dict) -> None:
    """Write the record of a stage, with the number of its format. Raises NotWritten if the disk refuses."""
    write_json(workdir / name / RECORD, {"format": FORMAT} | record)


def read_amendments(workdir: Path, name: str) -> list[Amendment]:
    """The amendments of a stage of a run; [] for one that has not begun."""
    return amendments_in(read_record(workdir, name))


def _from_checkpoints(workdir: Path, name: str) -> dict | None:
    meta = newest_meta(workdir, name)
    return meta and meta["config"]


def newest_meta(workdir: Path, name: str) -> dict | None:
    """The metadata of the newest checkpoint of a stage that this process can read; None: there is none."""
    directory = workdir / name / CHECKPOINTS
    if not (steps := saved_steps(directory)):
        return None
    # these import jax, which takes seconds
    from llm3.checkpoints.orbax_store import DamagedCheckpoint
    from llm3.checkpoints.stage_checkpoints import Checkpoints

    checkpoints = Checkpoints(directory, read_only=True)
    for step in reversed(steps):
        with suppress(DamagedCheckpoint):
            return checkpoints.meta(step)
    return None

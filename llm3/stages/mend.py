"""Files of a run that are empty or cannot be read, and that the run makes again from its checkpoints."""

import json
from contextlib import suppress
from pathlib import Path

from llm3.checkpoints.commit import saved_steps
from llm3.distributed.lock import holder
from llm3.errors import writing
from llm3.files import (
    CHECKPOINTS,
    DATA_SAMPLE,
    DETAILS,
    MATRIX,
    METRICS,
    PREDICTIONS,
    RECORD,
    RESOLVED,
    ROW,
    SAMPLES,
    SESSIONS,
    TOKENIZER,
    write_atomic,
)
from llm3.report.logs import lost_lines, read_metrics
from llm3.stages.records import read_record, write_record

AGAIN = "it is kept as {kept}, and written again"
PARQUET = b"PAR1"  # the last bytes of a file
WITHOUT = "it is kept as {kept}, and the report does without"


def mend(workdir: Path, names: list[str]) -> list[str]:
    """Set aside damaged files that can be made again, of a run and of its rows `names`; a line on each of them.

    A missing or damaged record is written again from the newest checkpoint that can be read. A row whose details or
    predictions are damaged is measured again; damaged lines of metrics and samples are left out. A row that another
    process holds is left to it.
    """
    said = _renamed([workdir / name for name in (MATRIX, RESOLVED, TOKENIZER)])
    said += _renamed([workdir / SESSIONS, *(workdir / name / DATA_SAMPLE for name in names)], WITHOUT)
    for name in names:
        directory = workdir / name
        if holder(directory):
            continue
        lost = _renamed([directory / RECORD])
        steps = saved_steps(directory / CHECKPOINTS)
        predictions = (directory / PREDICTIONS).glob("*.parquet")
        measured = _renamed([directory / ROW, directory / DETAILS, *sorted(predictions)])
        if measured or (lost and not steps):  # a row belongs to its details and to the config it was measured with
            for file in (ROW, DETAILS):
                if (directory / file).is_file():
                    _rename(directory / file)
        if steps and not (directory / RECORD).is_file() and (record := read_record(workdir, name)):
            write_record(workdir, name, record)
            lost = lost or [f"{directory / RECORD} is missing; it is written again from a checkpoint"]
        said += [*lost, *measured]
        for file in (METRICS, SAMPLES):
            said += _without_damaged_lines(directory / file)
        if (directory / ROW).is_file():  # else the stage resumes, perhaps from an earlier step
            said += lost_lines(directory, read_metrics(directory), steps[-1] if steps else 0)
    return said


def _parses(text: str | bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _is_intact(path: Path) -> bool:
    """Whether a file is JSON, or the end of a Parquet file is there."""
    if path.suffix != ".parquet":
        return _parses(path.read_bytes())
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - len(PARQUET)))
        return file.read() == PARQUET


def _renamed(paths: list[Path], then: str = AGAIN) -> list[str]:
    """Rename the files that are damaged; a line on each, which ends with what is done."""
    damaged = [path for path in paths if path.is_file() and not _is_intact(path)]
    return [f"{path} cannot be read: {then.format(kept=_rename(path).name)}" for path in damaged]


def _rename(path: Path) -> Path:
    kept = path.with_name(f"{path.name}.damaged")
    with writing(kept), suppress(FileNotFoundError):  # another run has done so
        path.replace(kept)
    return kept


def _without_damaged_lines(path: Path) -> list[str]:
    """Leave out the lines that are no JSON, but for an incomplete last one, which a killed process leaves."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    good = [line for line in lines if _step(line) is not None or (line is lines[-1] and not line.endswith("\n"))]
    if len(good) == len(lines):
        return []
    kept = _rename(path)
    with writing(path):
        write_atomic(path, "".join(good))
    return [f"{path}: {len(lines) - len(good)} of {len(lines)} lines cannot be read: left out; all are in {kept.name}"]


def _step(line: str) -> int | None:
    """The step of a line of metrics or samples; None: it is no such line."""
    value = json.loads(line) if _parses(line) else None
    step = value.get("step") if isinstance(value, dict) else None
    return step if isinstance(step, int) else None

"""The names of a run's files, and how a file is written: complete, or not at all."""

import json
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

from llm3.errors import UserError, writing

# In the directory of a run
TOKENIZER = "tokenizer.json"
REPORT = "report.md"
MATRIX = "matrix.json"  # the rows of all stages; written last, so that its presence marks a complete report
INIT = "init"  # the folder of the untrained model, and its name as the parent of baselines

# In the folder of a stage
CHECKPOINTS = "checkpoints"
RECORD = "config.json"  # the part of the config that the stage was computed from
METRICS = "metrics.jsonl"
ROW = "evaluation.json"  # the stage's row of the matrix, once the stage is finished
DETAILS = "details.json"  # what its evaluations report beyond single numbers


def write_whole(path: Path, text: str) -> None:
    """Write a text file such that a reader finds either the old content or the new one. Raises OSError.

    Missing folders are made. Several processes may write the same file at once: the last one wins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file with `write_whole`. Raises NotWritten where the disk refuses, ValueError for NaN or inf."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    with writing(path):
        write_whole(path, text)


def read_json(path: Path) -> Any:
    """The content of a JSON file, or None where there is none. Raises UserError for a damaged one."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore it, or use another --workdir") from error

"""The names of the files in a run directory, and atomic writes."""

import json
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

from llm3.errors import UserError, writing

# In the run directory
TOKENIZER = "tokenizer.json"
REPORT = "report.md"
MATRIX = "matrix.json"  # the rows of all stages; written last, so its presence marks a complete report
INIT = "init"  # the folder of the untrained model, and its name as a parent

# In a stage folder
CHECKPOINTS = "checkpoints"
RECORD = "config.json"  # the part of the config that determines the stage
METRICS = "metrics.jsonl"
ROW = "evaluation.json"  # the stage's row in the matrix, written when the stage is finished
DETAILS = "details.json"  # evaluation results that are not single numbers


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that a reader sees either the old content or the new one. Raises OSError.

    Missing folders are created. Several processes may write the same file at once: the last one wins.
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
    """Write a JSON file atomically. Raises NotWritten if the disk refuses, ValueError for NaN or inf."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    with writing(path):
        write_atomic(path, text)


def read_json(path: Path) -> Any:
    """The content of a JSON file; None if the file does not exist. Raises UserError if it is damaged."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore it, or use another --workdir") from error

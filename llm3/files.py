"""The names of the files in a run directory, the paths and names that a user gives, and atomic writes."""

import errno
import json
import os
import re
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

from llm3.errors import UserError, writing

# In the run directory
TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"  # the template of conversations, if the run has one
REPORT = "report.md"
REPORT_HTML = "report.html"
FIGURES = "figures"  # folder: the plots of the report, as SVG
MATRIX = "matrix.json"  # the rows of all stages; written last, so its presence marks a complete report
INIT = "init"  # the folder of the untrained model, and its name as a parent
START = "start"  # the folder of the pretrained model that a run starts from
RESOLVED = "config.resolved.json"  # every field of the config of the last session
COMPILED = "compiled"  # folder: compiled programs; a run works without it
SESSIONS = "sessions.json"  # when and where `run` worked on the run, and how long
MODEL = "model.json"  # in START: what the run keeps of that model

# In the directory of an ablation
PLAN = "ablation.json"  # its arms and stage runs; tells it from a run

FORMAT = 1  # of metadata and records, which name theirs; a reader takes those of older ones too

# In a stage folder
CHECKPOINTS = "checkpoints"
BASE = "base"  # folder: what delta checkpoints patch
RECORD = "config.json"  # the part of the config that determines the stage
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"  # the config's prompts, continued
DATA_SAMPLE = "data_sample.json"  # the first windows that the stage trains on, with their targets
SET_ASIDE = "set_aside"  # folder: what a change of the run replaced, in numbered folders
ROW = "evaluation.json"  # the stage's row in the matrix, written when the stage is finished
DETAILS = "details.json"  # evaluation results that are not single numbers
PREDICTIONS = "predictions"  # folder: the results of each evaluation item by item

# In the run directory, so no stage's name
RESERVED = frozenset(
    {INIT, START, COMPILED, "cache", TOKENIZER, CHAT_TEMPLATE, REPORT, REPORT_HTML, FIGURES, MATRIX, RESOLVED, SESSIONS}
)


def local_path(text: str | Path, where: str) -> Path:
    """The path that `where` (a flag or field) names, with a leading "~" expanded. Raises UserError for a URL."""
    if not str(text):
        raise UserError(f"{where} is empty: expected a path")
    if scheme := re.match(r"([A-Za-z][\w+.-]+):/", str(text)):
        hint = "; mount the bucket, see docs/cluster.md" if scheme[1] in ("gs", "s3") else ""
        raise UserError(
            f"{where}={str(text)!r}: {scheme[1]}:// is not supported; expected a path on this machine{hint}"
        )
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # "~name" without such a user
        raise UserError(f"{where}={str(text)!r}: {error}") from None


_copies: dict[str, str] = {}  # {folder on this machine: the URL that it is a copy of}


def show_as(folder: Path, url: str) -> None:
    """Let messages name a URL where they would name the folder that is its copy."""
    _copies[str(folder)] = url


def shown(text: object) -> str:
    """A text for the user, with URLs in place of their copies."""
    text = str(text)
    for folder, url in _copies.items():
        text = text.replace(folder, url)
    return text


def check_name(name: object, where: str) -> None:
    """Raise UserError unless a name is letters, digits, "_", "-" and ".": it becomes part of paths and commands."""
    if isinstance(name, str) and re.fullmatch(r"\w[\w.-]*", name):
        return
    usable = re.sub(r"[^\w.-]+", "_", str(name)).strip("._-")
    hint = f", as in {usable!r}" if usable else ""
    raise UserError(
        f"{where}: {name!r} cannot be a name: expected letters, digits, '_', '-' and '.', "
        f"the first a letter, a digit or '_'{hint}"
    )


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file, a text in UTF-8, so that a reader sees either the old content or the new one. Raises OSError.

    Missing folders are created. Several processes may write the same file at once: the last one wins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(partial)
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


# what mounted buckets answer where a folder is renamed: EMFILE is that of gcsfuse
NO_RENAMES = frozenset({errno.EMFILE, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.EXDEV})


def can_rename_folders(directory: Path) -> bool:
    """Whether folders in a folder can be renamed, unlike those in a mounted bucket; True if that cannot be tried."""
    probe = directory / f".{secrets.token_hex(4)}.partial"
    renamed = probe.with_suffix(".renamed")
    try:
        probe.mkdir()
        (probe / "file").touch()
        probe.rename(renamed)
        return True
    except OSError as error:
        return error.errno not in NO_RENAMES
    finally:
        for each in (probe, renamed):
            with suppress(OSError):
                (each / "file").unlink()
            with suppress(OSError):
                each.rmdir()


def sync(path: Path) -> None:
    """Return when the disk has the content of a file; a rename after it cannot reach the disk first. Raises OSError."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def ordinary_permissions(directory: Path) -> None:
    """Give files that libraries wrote through temporary files (mode 0600) the permissions of any new file here."""
    new = directory / f".{secrets.token_hex(4)}.partial"
    new.touch()
    mode = new.stat().st_mode & 0o777
    new.unlink()
    for path in directory.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def check_format(values: dict, where: object) -> None:
    """Raise UserError for metadata or a record of a newer llm3."""
    if (found := values.get("format", FORMAT)) > FORMAT:
        raise UserError(f"{where} has format {found}, and this llm3 reads up to {FORMAT}: update llm3")


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

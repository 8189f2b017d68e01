"""What lies where in a run's directory, and whose it is: one writer, one config for each stage."""

import fcntl
import json
import logging
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from llm3.config.schema import RunConfig, as_dict
from llm3.errors import FULL, NotWritten, UserError, writing

logger = logging.getLogger(__name__)

TOKENIZER = "tokenizer.json"
ROW = "evaluation.json"  # beside the files of a stage: its row of the matrix, once it is finished
DETAILS = "details.json"  # beside it: what its evaluations say beyond single figures
RECORD = "config.json"  # beside the files of a stage: what it was computed from
# May differ between two starts of one run: they change what is shown and kept, or where it is computed.
FREE_FIELDS = frozenset({"log_every", "save_every", "keep", "best"})
LOCK = ".lock"
BEAT_SECONDS = 10.0  # so often the holder of a workdir touches its lock
DEAD_SECONDS = 120.0  # who has not touched it for so long is dead


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all. Raises NotWritten where the disk refuses."""
    partial = path.with_name(f".{path.name}.partial")
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text)
        os.replace(partial, path)


def read_json(path: Path) -> Any:
    """The content of a JSON file, or None where there is none. Raises UserError for a damaged one."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore it, or use another --workdir") from error


def stage_record(config: RunConfig, name: str) -> dict:
    """The part of the config that decides what a stage computes, or, for the name of none, what all of them share."""
    record = as_dict(config)
    stage = record["stages"].get(name, {})
    shared = {key: record[key] for key in ("seed", "model", "tokenizer", "evaluations")}
    used = set(tokenizer_sources(config)) | {each.source for each in config.evaluations.values()}
    shared["sources"] = {key: record["sources"].get(key) for key in sorted(used | _drawn(stage, record["stages"]))}
    own = {key: value for key, value in stage.items() if key not in FREE_FIELDS}
    return json.loads(json.dumps(shared | ({"stage": own} if own else {})))


def _drawn(stage: dict, stages: dict[str, dict]) -> set[str]:
    """The sources of a stage's record: those that it names, and its parent's where it replays them."""
    if not stage:
        return set()
    start = stage["start"] if isinstance(stage["start"], dict) else {"stage": stage["start"]}
    parent = stages.get(start["stage"], {}) if stage["replay"] else {}
    return {
        *stage["data"],
        *(name for _, weights in stage["data_schedule"] for name in weights),
        *parent.get("data", ()),
    }


def tokenizer_sources(config: RunConfig) -> list[str]:
    """The sources that a new tokenizer is trained on: those the config names, else those of the pretrain stages."""
    if config.tokenizer.path:
        return []
    pretraining = [stage.data for stage in config.stages.values() if stage.kind == "pretrain"]
    return config.tokenizer.sources or sorted({source for data in pretraining for source in data})


def differences(before: Any, now: Any, where: str = "") -> list[str]:
    """Where two JSON values differ: "field: before -> now"."""
    if isinstance(before, dict) and isinstance(now, dict):
        lines = []
        for key in sorted(before.keys() | now.keys()):
            lines += differences(before.get(key), now.get(key), f"{where}.{key}" if where else key)
        return lines
    return [] if before == now else [f"  {where}: {before!r} there, {now!r} now"]


def check_record(workdir: Path, config: RunConfig, name: str) -> None:
    """Raise UserError where the workdir holds this stage of another config."""
    before = read_json(workdir / name / RECORD)
    if before is None:
        return
    if lines := differences(before, stage_record(config, name)):
        raise UserError(
            f"{workdir} holds {name!r} of another config:\n" + "\n".join(lines) + "\n"
            "Nothing was changed. Use another --workdir, or go back to the values there."
        )


class Holder(NamedTuple):
    """The process that has a workdir to itself, as its lock names it."""

    host: str
    process: int
    since: str
    command: str

    def __str__(self) -> str:
        return f"process {self.process} on {self.host} since {self.since} ({self.command})"


@contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Hold the workdir alone, for as long as this context lasts.

    The kernel frees the lock of a process however it ends. But some file systems keep a lock to the host that took it,
    and some have none: there, who touches the lock from time to time is alive. Raises UserError that names the holder,
    or for a directory that cannot be made; NotWritten where the disk is full.
    """
    path = workdir / LOCK
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        handle = open(path, "ab+", buffering=0)  # noqa: SIM115 - held for as long as the context
    except OSError as error:
        kind = NotWritten if error.errno in FULL else UserError
        raise kind(f"--workdir={workdir}: {error.strerror}: {error.filename}") from error
    with handle:
        own = _take(path, handle)
        ended = threading.Event()
        threading.Thread(target=_touch, args=(path, ended), name="lock", daemon=True).start()
        try:
            yield
        finally:
            ended.set()
            with suppress(OSError):
                if _holder(path) == own:
                    handle.truncate(0)


def _take(path: Path, handle: Any) -> Holder:
    """Put the name of this process in the lock, and return it. Raises UserError where another one is alive."""
    own = Holder(socket.gethostname(), os.getpid(), time.strftime("%Y-%m-%dT%H:%M:%S%z"), _command())
    locked = True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"{path.parent} is in use by {_holder(path) or 'a process that has just begun'}") from error
    except OSError:
        locked = False  # a network file system that has no locks
    before = _holder(path)
    if before and not (locked and before.host == own.host) and _is_alive(path, before, own.host):
        raise UserError(f"{path.parent} is in use by {before}")
    with writing(path):
        handle.truncate(0)
        handle.write(json.dumps(own._asdict()).encode())
    if not locked:
        time.sleep(BEAT_SECONDS / 10)  # for one that begins at the same moment: the last to write has it
        if (other := _holder(path)) != own:
            raise UserError(f"{path.parent} is in use by {other or 'another process'}")
    return own


def _command() -> str:
    return shlex.join(["python", "-m", "llm3", *sys.argv[1:]])


def _holder(path: Path) -> Holder | None:
    """Who is named in a lock; None where it was given back."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _is_alive(path: Path, holder: Holder, host: str) -> bool:
    """Whether the process that is named in a lock is alive; waits to see it touch the lock where that is not known."""
    if holder.host == host and not _runs(holder.process):
        return False
    before = _touched(path)
    age = time.time() - before
    seconds = min(max(DEAD_SECONDS - age, 3 * BEAT_SECONDS), DEAD_SECONDS)  # clocks may differ: some beats at least
    logger.warning("%s is held by %s: waiting %.0f s for a sign of life", path, holder, seconds)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(BEAT_SECONDS / 10)
        if _touched(path) != before:
            return _holder(path) is not None
    logger.warning("%s: no sign of life for %.0f s: its holder is taken for dead", path, max(age, 0) + seconds)
    return False


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _touched(path: Path) -> float:
    with path.open() as file:  # over a network, only who opens a file sees what others have done to it
        return os.fstat(file.fileno()).st_mtime


def _touch(path: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT_SECONDS):
        with suppress(OSError):
            os.utime(path)

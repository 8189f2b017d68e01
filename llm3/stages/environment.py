"""The sessions of a run: when `run` worked on it, with which code and libraries, and how long."""

import importlib.metadata
import platform
import shlex
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import llm3
from llm3.distributed.lock import shared
from llm3.files import SESSIONS, read_json, write_json

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tokenizers", "datasets")


def commit() -> str | None:
    """The git commit of llm3, with a note if files differ from it; None if llm3 is not tracked by git."""
    tracked = _git("ls-files", "--error-unmatch", "__init__.py")  # a parent folder may be another repository
    head = _git("rev-parse", "HEAD")
    if tracked is None or head is None:
        return None
    return f"{head} (dirty: with uncommitted changes)" if _git("status", "--porcelain", "-uno") else head


def _git(*arguments: str) -> str | None:
    """What git prints in the folder of llm3; None if it fails."""
    command = ["git", "-C", str(Path(llm3.__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def environment() -> dict[str, str]:
    """{name: value}: the commit of llm3, Python, the system and the versions of libraries."""
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return {
        "commit": commit() or "unknown (not a git checkout)",
        "python": f"{platform.python_version()} on {platform.platform()}",
        "packages": packages,
    }


class SessionLog:
    """One session of `run` in the run's SESSIONS file, which begins now. Only the first process may write it."""

    def __init__(self, workdir: Path, stages: list[str]):
        self._path, self._since = workdir / SESSIONS, time.perf_counter()
        self._record = {
            "started": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "command": shlex.join(["python", "-m", "llm3", *sys.argv[1:]]),
            "stages": stages,
            "environment": environment(),
        }

    def write(self, facts: dict[str, Any], wall_seconds: dict[str, float]) -> None:
        """Write the session with its wall time until now. wall_seconds: of the parts that belong to no stage.

        facts: devices, data and so on. Raises NotWritten if the disk refuses.
        """
        now = {"facts": facts, "seconds": time.perf_counter() - self._since, "wall_seconds": wall_seconds}
        with shared(self._path.parent):
            others = [each for each in read_json(self._path) or [] if not self._is(each)]
            write_json(self._path, [*others, self._record | now])

    def _is(self, other: dict[str, Any]) -> bool:
        return all(other.get(key) == self._record[key] for key in ("started", "stages"))

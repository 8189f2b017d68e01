"""Whole ablations with steps of milliseconds: what is trained, its results, and what a kill or a failure leaves."""

import json
import os
import re
import shutil
import signal
import types

import pytest

from llm3.__main__ import main
from llm3.ablation import local
from llm3.distributed.lock import lock
from llm3.errors import Exit
from tests.helpers import tiny_ablation as tiny_ab
from tests.helpers import tiny_folder
from tests.helpers import tiny_run as tiny

pytestmark = pytest.mark.slow
SMALL = "c.seeds = [0]\n"
TOP = 'c.arms["top"] = {"change": {"stages.finetune.train": "top(1)"}}\n'
NO_GENERAL = "del c.evaluations.general\n"
# the stages of one run that does by hand what all arms do with seed 1
BY_HAND = """
shared, fit = dict(c.stages.posttrain, seed=1), dict(c.stages.finetune, seed=1)
of = lambda parent, **more: dict(fit, start=dict(stage=parent, fresh=["head/.*"]), **more)
c.stages = dict(
    pretrain=dict(c.stages.pretrain, seed=0),
    posttrain=shared,
    all_three=of("posttrain"),
    no_domain=of("pretrain"),
    top=of("posttrain", train="top(1)"),
)
c.tokenizer.sources = ["domain", "general"]
"""


class Started(list):
    """The names of the stage runs that were started, of which some get a point at which they die."""

    def __init__(self):
        self.points, self.polled = {}, lambda process: None

    def __call__(self, folder, slot):
        self.append(folder.name)
        point = self.points.pop(folder.name.rpartition("-")[0], "")
        return tiny_ab.Process(folder, point, lambda process: self.polled(process))


@pytest.fixture(scope="module")
def started():
    with pytest.MonkeyPatch.context() as patch:
        found = Started()
        patch.setattr(local, "start_process", found)
        yield found


@pytest.fixture(scope="module")
def ablate(tmp_path_factory):
    """Runs the verb on the tiny ablation with some more lines; its base is one folder for all workdirs."""
    base = tmp_path_factory.mktemp("ablation")

    def ablate(workdir, lines="", *flags):
        file = tiny_ab.write_ablation(base, lines, NO_GENERAL)
        return main(["ablate", f"--config={file}", f"--workdir={workdir}", *flags])

    ablate.base = base
    return ablate


@pytest.fixture(scope="module")
def study(ablate, started, tmp_path_factory):
    """Two arms and a seed; then a plan with one more of each; then these trained, two at a time."""
    workdir = tmp_path_factory.mktemp("study") / "w"
    assert ablate(workdir, SMALL, "--plan") == 0 and not workdir.exists()
    assert ablate(workdir, SMALL) == 0
    first, before = list(started), tiny.files(workdir)
    assert ablate(workdir, TOP, "--plan") == 0 and tiny.files(workdir) == before
    assert ablate(workdir, TOP, "--jobs=2") == 0
    return types.SimpleNamespace(workdir=workdir, first=first, second=started[len(first) :], before=before)


def kinds(names):
    return sorted(name.rpartition("-")[0] for name in names)


def test_shared_stages_are_trained_once_and_what_is_added_alone_later(study):
    assert kinds(study.first) == ["finetune", "finetune", "posttrain", "pretrain"]
    assert kinds(study.second) == 4 * ["finetune"] + ["posttrain"]
    assert not set(study.first) & set(study.second)
    chains = [chain for variant in tiny_ab.plan(study.workdir).values() for chain in variant["chains"].values()]
    assert len(chains) == 6 and {name for chain in chains for name in chain} == {*study.first, *study.second}


def test_files_of_finished_stage_runs_are_not_touched(study):
    after = tiny.files(study.workdir)
    runs = {path: file for path, file in study.before.items() if path.startswith("runs/")}
    assert runs and runs == {path: after[path] for path in runs}


def test_a_chain_has_the_bits_of_the_same_stages_in_one_config(study, ablate, tmp_path):
    """Also where a stage replays the data of its parent by weights that follow from sizes of sources."""
    config = tiny.write_config(tmp_path / "hand.py", ablate.base, tiny_ab.SMALL + NO_GENERAL + BY_HAND)
    tiny.process(["run", f"--config={config}", f"--workdir={tmp_path / 'hand'}"])
    for name, variant in tiny_ab.plan(study.workdir).items():
        *_, run = variant["chains"]["1"]
        row = json.loads((study.workdir / "runs" / run / "finetune" / "evaluation.json").read_text())
        by_hand = tiny.rows(tmp_path / "hand")[name.replace(" ", "_")]
        same = ("params_digest", "task_accuracy", "task_nll", "tokens", "hardware_flops")
        assert {key: row.get(key) for key in same} == {key: by_hand.get(key) for key in same}, name


def test_nothing_is_left_to_do_and_the_plan_is_the_same_again(study, ablate, started, capsys):
    before, count = tiny.files(study.workdir), len(started)
    assert ablate(study.workdir, TOP) == 0
    assert "of which 0 are to be trained" in " ".join(capsys.readouterr().out.split())
    after = tiny.files(study.workdir)
    assert len(started) == count and {path: file[1] for path, file in after.items()} == {
        path: file[1] for path, file in before.items()
    }


def test_a_second_ablate_in_the_same_directory_is_refused(study, ablate, capsys):
    before = tiny.files(study.workdir)
    with lock(study.workdir):
        assert ablate(study.workdir, TOP) == Exit.BAD_INPUT
    assert "is in use by process" in capsys.readouterr().err and tiny.files(study.workdir) == before


def test_what_a_kill_and_a_stop_leave_is_resumed_to_the_same_bits(study, ablate, started, tmp_path, capsys):
    """In a copy elsewhere, without a stage run and its children: it is killed, then the launcher gets SIGTERM."""
    workdir = tmp_path / "moved"
    shutil.copytree(study.workdir, workdir)
    variants = tiny_ab.plan(workdir)
    for name in {name for each in ("all three", "top") for name in variants[each]["chains"]["1"][1:]}:
        shutil.rmtree(workdir / "runs" / name)
    started.points = {"posttrain": "SIGKILL@saved:posttrain:2"}
    assert ablate(workdir, TOP) == Exit.PARTIAL
    failed = json.loads((workdir / "failed.json").read_text())
    [killed] = [name for name, why in failed.items() if why.startswith("exit -9")]
    assert kinds(failed) == ["finetune", "finetune", "posttrain"]
    assert {why for name, why in failed.items() if name != killed} == {f"its parent {killed} failed"}

    def stop(process):
        if not stops and process.stopped():  # a SIGCONT before it stops would be lost
            stops.append(process)
            os.kill(os.getpid(), signal.SIGTERM)  # the launcher, which passes it on
            process.send_signal(signal.SIGCONT)

    stops, started.points, started.polled = [], {"posttrain": "SIGSTOP@log:posttrain:3"}, stop
    assert ablate(workdir, TOP) == Exit.PREEMPTED and stops
    assert "Stopped; everything is saved" in capsys.readouterr().out
    started.polled = lambda process: None
    assert ablate(workdir, TOP) == 0
    log = (workdir / "runs" / killed / "log.txt").read_text()
    assert re.findall(r"resumes at step (\d)", log) == ["2", "4"], log
    assert tiny_ab.digests(workdir) == tiny_ab.digests(study.workdir)
    assert tiny_ab.plan(workdir) == tiny_ab.plan(study.workdir)


def test_an_arm_that_fails_is_reported_and_stops_no_other(study, ablate, started, tmp_path, capsys):
    workdir = tmp_path / "w"
    shutil.copytree(study.workdir, workdir)
    change = {"stages.posttrain.optimizer.learning_rate": 1e30, "stages.posttrain.guard.stop_after": 1}
    bias = {"change": {"stages.finetune.train": ".*/bias"}}
    bad = f'c.arms = {{"bad": {{"change": {change}}}, **c.arms, "bias": {bias}}}\n'
    assert ablate(workdir, SMALL + bad) == Exit.PARTIAL
    failed = json.loads((workdir / "failed.json").read_text())
    [(parent, why), (child, other)] = failed.items()
    assert parent.startswith("posttrain-") and why.startswith(f"exit {Exit.DIVERGED}: ")
    assert child.startswith("finetune-") and other == f"its parent {parent} failed"
    [bias] = tiny_ab.digests(workdir).keys() - tiny_ab.digests(study.workdir).keys()
    assert tiny_ab.plan(workdir)["bias"]["chains"]["0"][-1] == bias
    assert f"{parent}: failed: exit 3" in " ".join(capsys.readouterr().out.split())


def one_arm(ablate, folder, base):
    """An ablation in `folder` of the base alone, which has these lines; {stage: its row}."""
    file = tiny_ab.write_ablation(folder, "c.arms, c.seeds = {}, [0]", base)
    assert main(["ablate", f"--config={file}", f"--workdir={folder / 'w'}"]) == 0
    [variant] = tiny_ab.plan(folder / "w").values()
    paths = [folder / "w" / "runs" / name / name.rpartition("-")[0] for name in variant["chains"]["0"]]
    return {path.name: json.loads((path / "evaluation.json").read_text()) for path in paths}


def test_a_base_that_starts_from_a_stage_of_another_run_has_the_bits_of_the_whole_chain(study, ablate, tmp_path):
    [*_, pretrain] = (name for name in study.first if name.startswith("pretrain"))
    shutil.copytree(ablate.base / "texts", tmp_path / "texts")
    start = {"run": str(study.workdir / "runs" / pretrain), "stage": "pretrain"}
    rows = one_arm(
        ablate,
        tmp_path,
        NO_GENERAL + f"del c.stages.pretrain, c.stages.posttrain.start\nc.stages.posttrain.start = {start}\n",
    )
    chain = tiny_ab.plan(study.workdir)["all three"]["chains"]["0"]
    digests = tiny_ab.digests(study.workdir)
    assert [row["params_digest"] for row in rows.values()] == [digests[name] for name in chain[1:]]


def test_a_base_that_starts_from_a_pretrained_model_has_the_bits_of_one_run(started, ablate, tmp_path):
    tiny.write_texts(tmp_path / "texts")
    tiny_folder.write_folder(tmp_path / "model", tiny.documents())
    begin = f'c.stages.posttrain.update(start=dict(model="{tmp_path}/model"), data=dict(domain=1.0), replay=0.0)\n'
    gone = "c.model, c.tokenizer, c.stages.pretrain, c.stages.posttrain.start, c.evaluations.general"
    base = f"del {gone}\n{begin}"
    rows = one_arm(ablate, tmp_path, base)
    seeds = "for stage in c.stages.values():\n    stage.seed = 0\n"
    config = tiny.write_config(tmp_path / "hand.py", tmp_path, tiny_ab.SMALL + base + seeds)
    tiny.process(["run", f"--config={config}", f"--workdir={tmp_path / 'hand'}"])
    by_hand = tiny.digests(tmp_path / "hand")
    assert {name: row["params_digest"] for name, row in rows.items()} == {name: by_hand[name] for name in rows}

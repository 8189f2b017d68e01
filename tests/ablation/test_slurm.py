"""The command lines that `ablate --launcher=slurm` gives to SLURM, by a stand-in for sbatch and squeue."""

import io
import json
import pathlib

import pytest
from rich.console import Console

from llm3.ablation import slurm
from llm3.ablation.costs import Cost
from llm3.ablation.graph import Node, directory
from llm3.errors import Exit, UserError

SEEDS = [0, 1, 2]


def chain(variant, stages, seeds=SEEDS, shared=()):
    """The stage runs of a variant; those of `shared` are the same for all seeds."""
    found = {}
    for seed in seeds:
        parent = ""
        for stage in stages:
            name = f"{stage}-{variant}" + ("" if stage in shared else f"-{seed}")
            found.setdefault(name, Node(name, stage, parent, {}, Cost(), stage, [(variant, seed)], {}))
            parent = name
    return list(found.values())


class Cluster:
    """Numbers jobs from 1; every task stays in the queue until a test takes it out."""

    def __init__(self, workdir, monkeypatch):
        self.workdir, self.finished, self.queue, self.submitted, self.output = workdir, set(), [], [], io.StringIO()
        monkeypatch.setattr(slurm, "_run", self.run)

    def run(self, command, **variables):
        if command[0] == "squeue":
            return "\n".join(self.queue)
        options = dict(each.lstrip("-").partition("=")[::2] for each in command if each.startswith("--"))
        job = str(len(self.submitted) + 1)
        self.queue += [f"{job}_{task}" for task in options["array"].split(",")]
        folders = pathlib.Path(variables["RUNS"]).read_text().splitlines()
        options["runs"] = {task: pathlib.Path(folders[int(task)]).name for task in options["array"].split(",")}
        self.submitted.append(options | {"words": command})
        return f"{job};cluster\n"

    def submit(self, nodes, *options):
        def prepare(node):
            folder = directory(self.workdir, node.name)
            folder.mkdir(parents=True, exist_ok=True)
            return folder

        def result(node):
            return "fine" if node.name in self.finished else None

        jobs = slurm.Jobs(self.workdir, Console(file=self.output, width=200), prepare, result, list(options), SEEDS)
        before = len(self.submitted)
        status = jobs.submit(nodes)
        return status, self.submitted[before:]


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    return Cluster(tmp_path, monkeypatch)


def test_seeds_are_arrays_whose_tasks_wait_for_the_tasks_of_their_seed(cluster):
    status, [pre, post, fit] = cluster.submit(chain("a", ["pretrain", "posttrain", "finetune"]))
    assert status == 0
    assert [each["array"] for each in (pre, post, fit)] == ["0,1,2"] * 3
    assert "dependency" not in pre and (post["dependency"], fit["dependency"]) == ("aftercorr:1", "aftercorr:2")
    assert post["kill-on-invalid-dep"] == "yes"
    assert fit["runs"] == {str(seed): f"finetune-a-{seed}" for seed in SEEDS}
    assert fit["words"][-2:] == ["launch/slurm.sbatch", "--bare"] and fit["job-name"] == "llm3-finetune"


def test_all_seeds_wait_for_a_parent_that_they_share(cluster):
    nodes = chain("a", ["pretrain", "finetune"], shared=["pretrain"])
    _, [pre, fit] = cluster.submit(nodes)
    assert pre["array"] == "0" and (fit["array"], fit["dependency"]) == ("0,1,2", "afterok:1_0")


def test_options_of_the_user_come_last_before_the_script(cluster):
    _, [job] = cluster.submit(chain("a", ["pretrain"]), "--partition=gpu", "--nodes=1")
    assert job["words"][-4:] == ["--partition=gpu", "--nodes=1", "launch/slurm.sbatch", "--bare"]


def test_what_is_queued_or_finished_is_not_submitted_again(cluster):
    nodes = chain("a", ["pretrain", "finetune"])
    cluster.submit(nodes)
    assert cluster.submit(nodes) == (0, [])
    cluster.finished = {each.name for each in nodes}
    cluster.queue.clear()
    assert cluster.submit(nodes) == (0, [])


def test_an_arm_or_a_seed_added_later_waits_for_tasks_of_earlier_jobs(cluster):
    few = chain("a", ["pretrain", "finetune"], seeds=[0, 2])
    cluster.submit(few)
    cluster.finished.add("pretrain-a-0")
    cluster.queue.remove("1_0")
    more = chain("a", ["pretrain", "finetune"])
    for seed in SEEDS:
        more.append(Node(f"top-{seed}", "finetune", f"pretrain-a-{seed}", {}, Cost(), "", [("top", seed)], {}))
    _, jobs = cluster.submit(more)
    found = [(each["array"], each.get("dependency")) for each in jobs]
    assert found == [
        ("1", None),  # pretrain of the new seed
        ("1", "afterok:3_1"),  # its finetune
        ("0", None),  # the new arm: a finished parent, a new one, and one of the first job
        ("1", "afterok:3_1"),
        ("2", "afterok:1_2"),
    ]


def test_a_failed_task_is_reported_and_submitted_again_with_its_children(cluster):
    nodes = chain("a", ["pretrain", "finetune"]) + chain("b", ["pretrain", "finetune"])
    cluster.submit(nodes)
    cluster.finished = {each.name for each in nodes if each.uses[0] != ("a", 1)}
    cluster.queue.clear()
    (directory(cluster.workdir, "pretrain-a-1") / "log.txt").write_text("step 3\nllm3: diverged\n\n")
    status, jobs = cluster.submit(nodes)
    assert status == Exit.PARTIAL and "pretrain-a-1 failed: llm3: diverged" in cluster.output.getvalue()
    assert json.loads((cluster.workdir / "failed.json").read_text()) == {"pretrain-a-1": "llm3: diverged"}
    assert [each["runs"] for each in jobs] == [{"1": "pretrain-a-1"}, {"1": "finetune-a-1"}]
    assert jobs[1]["dependency"] == "afterok:5_1"


def test_parents_are_submitted_first_whichever_seeds_are_left(cluster):
    nodes = chain("a", ["pretrain", "posttrain", "finetune"])
    cluster.finished = {"pretrain-a-0", "posttrain-a-0", "pretrain-a-1"}
    _, jobs = cluster.submit(nodes)
    order = [(name, each.get("dependency")) for each in jobs for name in each["runs"].values()]
    assert [name for name, _ in order].index("posttrain-a-2") > [name for name, _ in order].index("pretrain-a-2")
    assert dict(order)["finetune-a-0"] is None and dict(order)["finetune-a-1"] is not None


def test_slurm_that_refuses_is_quoted(monkeypatch, tmp_path):
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition' >&2; exit 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(UserError, match="sbatch: error: invalid partition"):
        slurm._run(["sbatch"])

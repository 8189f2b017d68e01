"""Runs on several devices and in several processes: the same losses, and no kind of death that changes them."""

import pathlib
import shutil
import types

import numpy as np
import pytest

from llm3.errors import Exit
from llm3.stages.samples import read_samples
from tests.helpers import tiny_cluster as cluster
from tests.helpers import tiny_records
from tests.helpers import tiny_run as tiny

pytestmark = pytest.mark.slow

STEPS, SAVES = 6, (2, 4, 6)
LAYOUTS = {"1 x 1": (1, 1), "1 x 8": (1, 8), "2 x 2": (2, 2)}  # processes x devices of each
MESHES = {
    "1 x 1": {},
    "1 x 8": {"fsdp": 2, "tensor": 2},
    "2 x 2": {"data": 1, "fsdp": -1},  # every parameter lies in pieces on both processes
}
# (saved on, goes on on, stage): a stage that trains all, and one that trains a part
MOVES = [
    ("2 x 2", "1 x 1", "pretrain"),
    ("2 x 2", "1 x 8", "finetune"),
    ("1 x 8", "2 x 2", "pretrain"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cluster") / "base"
    tiny.write_texts(directory / "texts")
    return directory


def started(base, name, *more):
    """A config of three stages of 6 steps, and the command that runs it in base/NAME."""
    extra = "\n".join(
        [
            "for stage in c.stages.values():",
            f"    stage.update(steps={STEPS}, log_every=1, save_every={SAVES[0]})",
            "c.stages.finetune.train = 'top(1)'",
        ]
    )
    config = tiny.write_config(base / "config.py", base, extra)
    return ("run", f"--config={config}", f"--workdir={base / name}", *more)


def run(base, name, layout, *more, status=0, points=None, caches=None):
    processes, devices = LAYOUTS[layout]
    mesh = [f"--config.mesh.{axis}={size}" for axis, size in MESHES[layout].items()]
    command = started(base, name, *mesh, *more)
    ended = cluster.run(*command, processes=processes, devices=devices, points=points, caches=caches)
    if status is not None:
        assert [each.status for each in ended] == [status] * processes, "\n".join(each.stderr for each in ended)
    return ended


STAGES, NO_EVALUATIONS = "--stages=pretrain,posttrain,finetune", "--config.evaluations={}"


@pytest.fixture(scope="module")
def whole(base):
    """The three stages on each layout; two processes do not share a cache, as on hosts that do not share homes."""
    samples = ("--config.samples=['The']", "--config.sample_tokens=2", "--config.stages.pretrain.sample_every=4")

    def few_saves(layout):
        moved = {stage for saved_on, _, stage in MOVES if saved_on == layout}
        return [f"--config.stages.{each}.save_every={STEPS}" for each in set(tiny.STAGES[:3]) - moved]

    outputs = {layout: run(base, layout, layout, STAGES, *samples, *few_saves(layout)) for layout in list(LAYOUTS)[:-1]}
    caches = {index: str(base / f"cache of {index}") for index in range(2)}
    own_caches = ("--config.cache_dir=", *few_saves("2 x 2"))
    outputs["2 x 2"] = run(base, "2 x 2", "2 x 2", STAGES, *samples, *own_caches, caches=caches)
    return types.SimpleNamespace(outputs=outputs, workdir=lambda layout: base / layout, caches=list(caches.values()))


def losses(workdir, stage):
    return [line["loss"] for line in tiny.metrics(workdir / stage)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_samples_are_taken_on_every_layout(whole, layout):
    steps = {"init": [0], "pretrain": [4, STEPS], "posttrain": [STEPS]}
    for stage, expected in steps.items():
        assert [line["step"] for line in read_samples(whole.workdir(layout) / stage)] == expected


@pytest.mark.parametrize("stage", ["pretrain", "posttrain", "finetune"])
@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
def test_every_layout_of_devices_and_processes_gives_the_same_losses(whole, stage, layout):
    expected = losses(whole.workdir("1 x 1"), stage)
    assert len(expected) == STEPS
    np.testing.assert_allclose(losses(whole.workdir(layout), stage), expected, rtol=0, atol=1e-5)


def test_every_layout_gives_the_same_figures(whole):
    rows = {layout: tiny.rows(whole.workdir(layout)) for layout in LAYOUTS}
    assert len({row["init"]["params_digest"] for row in rows.values()}) == 1
    for layout in list(LAYOUTS)[1:]:
        for stage, row in rows["1 x 1"].items():
            for key in ("general_bits_per_byte", "domain_bits_per_byte", "task_accuracy", "tokens", "flops"):
                expected = row[key] and pytest.approx(row[key], rel=1e-4)
                assert rows[layout][stage][key] == expected, (layout, stage, key)


def test_each_process_builds_what_it_does_not_share_with_the_first(whole):
    first, second = (tiny_records.files(pathlib.Path(each)) for each in whole.caches)
    tokens = {name: content for name, content in first.items() if name.startswith("tokens-")}
    assert tokens and tokens == {name: content for name, content in second.items() if name.startswith("tokens-")}


def test_the_first_process_speaks_and_the_others_are_silent(whole):
    first, second = whole.outputs["2 x 2"]
    assert "process 0 of 2" in first.stderr and "4 x cpu of 2 processes" in first.stdout
    assert "pretrain" in first.stdout and "pretrain" not in second.stdout


@pytest.mark.parametrize(("saved_on", "layout", "stage"), MOVES)
def test_a_checkpoint_goes_on_on_another_number_of_processes_with_the_same_losses(base, whole, saved_on, layout, stage):
    """Between meshes of one process: tests/checkpoints/test_meshes.py."""
    moved = base / f"from {saved_on} to {layout}"
    shutil.copytree(whole.workdir(saved_on), moved)
    (moved / stage / "evaluation.json").unlink()
    shutil.rmtree(moved / stage / "checkpoints" / str(STEPS))
    output = run(base, moved.name, layout, f"--stages={stage}", NO_EVALUATIONS)[0].stdout
    assert f"{stage}: resumes at step {SAVES[-2]}" in output
    np.testing.assert_allclose(losses(moved, stage), losses(whole.workdir("1 x 1"), stage), rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def died(base):
    """How the starts of one run ended: each process is killed once, then one gets SIGTERM, then the run ends.

    Steps count from each start; at the first death, the save of step 4 has waited for that of step 2. SIGTERM comes in
    a second step: in the first one, the other process may still compile, and then both stop at once. A start traces all
    stages that it is to train, so the first ones are to train no more than they come to.
    """
    points = ({1: "SIGKILL@step::5"}, {0: "SIGKILL@step::6"}, {1: "SIGTERM@computing:finetune:2"}, None)
    stages = ("--stages=pretrain", "--stages=pretrain,posttrain", STAGES, STAGES)
    return [
        run(base, "died", "2 x 2", each, NO_EVALUATIONS, status=None, points=at)
        for each, at in zip(stages, points, strict=True)
    ]


def test_when_one_of_two_processes_is_killed_the_other_ends_and_the_same_command_goes_on(base, whole, died):
    """First one, later the other, then to the end: bit for bit what the run that was not killed gave."""
    for victim, ended in zip((1, 0), died, strict=False):
        assert ended[victim].status == -9
        assert ended[1 - victim].status not in (0, -9), "it is the harness that kills a process that does not end"
    assert "pretrain: resumes at step" in died[1][0].stdout
    assert "posttrain" in died[2][0].stdout and "pretrain: resumes" not in died[2][0].stdout
    assert tiny.digests(base / "died") == tiny.digests(whole.workdir("2 x 2"))


def test_sigterm_to_one_process_saves_and_ends_all_of_them_with_a_status_of_its_own(base, whole, died):
    *_, stopped, done = died
    assert [each.status for each in stopped] == [Exit.PREEMPTED] * 2, stopped[0].stderr
    assert "Stopped by SIGTERM; everything is saved" in stopped[0].stdout
    assert [each.status for each in done] == [0, 0], done[0].stderr
    resumed = next(line for line in done[0].stdout.splitlines() if "resumes at step" in line)
    assert resumed.startswith("finetune: resumes at step ") and 1 <= int(resumed.split()[-1]) < STEPS
    assert tiny.digests(base / "died") == tiny.digests(whole.workdir("2 x 2"))


@pytest.mark.parametrize("where", ["data", "step"])
def test_a_process_that_hangs_is_named_by_all_and_every_one_shows_its_stacks(base, where):
    more = ("--stages=pretrain", NO_EVALUATIONS, "--config.hang_seconds=600")
    points = {1: f"HANG@{where}::2"}
    ended = run(base, f"hung {where}", "2 x 2", *more, status=Exit.HUNG, points=points)
    for process, each in enumerate(ended):
        assert f"process {process} of 2" in each.stderr and "late: process 1\n" in each.stderr
        assert "Current thread" in each.stderr or "Thread 0x" in each.stderr
    assert "sleep" not in ended[0].stderr
    assert "in patched" in ended[1].stderr, "the stack of the late one says where it hangs"


def test_processes_with_different_configs_or_directories_are_refused_by_all_before_anything_is_written(base):
    ended = [
        cluster.run(*started(base, "differ", NO_EVALUATIONS), devices=1, flags={1: flag})
        for flag in ("--config.stages.pretrain.optimizer.learning_rate=0.5", f"--workdir={base / 'elsewhere'}")
    ]
    assert [each.status for processes in ended for each in processes] == [Exit.BAD_INPUT] * 4
    assert "process 1 (on " in ended[0][0].stderr and "learning_rate: 0.5, there 0.01" in ended[0][0].stderr
    assert "process 1 (on " in ended[1][0].stderr and "a disk that all hosts share" in ended[1][0].stderr
    assert not (base / "differ").exists() and not (base / "elsewhere").exists()


def test_a_stage_in_use_is_refused_by_all_processes(base):
    from llm3.distributed.lock import lock

    with lock(base / "used" / "posttrain"):
        ended = run(base, "used", "2 x 2", STAGES, status=Exit.BAD_INPUT)
    assert "is in use by process" in ended[0].stderr
    assert ended[1].stderr.count("is in use") == 0

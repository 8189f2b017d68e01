"""A run that is killed again and again, wherever it is, ends bit for bit as one that is not."""

import random
import re
import types

import pytest

from llm3.checkpoints.stage_checkpoints import BASE, Checkpoints
from tests.helpers import tiny_run as tiny

pytestmark = pytest.mark.slow

SEED, DEATHS = 42, 9
STAGES = ("pretrain", "posttrain", "finetune")
STEPS, SAVES = range(1, 11), (4, 8, 10)
SAVING = ("saving", "part", "commit", "committed", "saved")  # of one step at most one: after it, it may be there
EXTRA = """c.evaluations = {}
c.stages = {name: c.stages[name].to_dict() for name in ("pretrain", "posttrain", "finetune")}
c.stages.finetune.train = "top(1)"
"""


def drawn(seed: int) -> list[str]:
    """Points of `tiny_deaths` in the order in which a run comes by: 4 saves, 3 of the hand-offs, 2 between."""
    pick, order = random.Random(seed), {}

    def add(points: dict[str, tuple], count: int) -> None:
        order.update({point: points[point] for point in pick.sample(sorted(points), count)})

    saves = {
        f"{pick.choice(SAVING)}:{stage}:{step}": (place, 2, step, 2)
        for place, stage in enumerate(STAGES)
        for step in SAVES
    }
    begins = {
        f"{what}:{STAGES[place]}": (place, 0, n) for n, what in enumerate(("reading", "handed")) for place in (1, 2)
    }
    base = ("saving_base:finetune", "part:finetune:0", "commit:finetune:0", "committed:finetune:0")
    begins |= {pick.choice(base): (2, 1, 0), "saved_base:finetune": (2, 1, 1)}
    between = {
        f"{what}:{stage}:{step}": (place, 2, step, n)
        for place, stage in enumerate(STAGES)
        for n, what in enumerate(("computing", "log"))
        for step in STEPS
        if what == "computing" or step % 2 == 0
    }
    between |= {f"row:{stage}": (place, 3) for place, stage in enumerate(STAGES)}
    add(saves, 4)
    add(begins, 3)
    add(between, DEATHS - 7)
    return sorted(order, key=order.get)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One that is left alone, and one that dies at each of the points, and then goes to the end."""
    base = tmp_path_factory.mktemp("deaths") / "base"
    tiny.write_texts(base / "texts")
    config = tiny.write_config(base / "config.py", base, EXTRA)
    whole, killed = base / "whole", base / "killed"
    command = lambda workdir: ("run", f"--config={config}", f"--workdir={workdir}")  # noqa: E731
    tiny.process(command(whole))
    points = drawn(SEED)
    # a start traces all stages that it is to train: first one of them, then two
    parts = [(*command(killed), f"--stages={','.join(STAGES[:count])}") for count in (1, 2, 3)]
    output = tiny.process(*parts, deaths=[f"SIGKILL@{point}" for point in points]).stdout
    return types.SimpleNamespace(whole=whole, killed=killed, points=points, output=output)


def test_the_points_are_in_every_stage_and_inside_saves_commits_and_hand_offs():
    points = drawn(SEED)
    assert len(set(points)) == DEATHS and points == drawn(SEED) != drawn(SEED + 1)
    kinds = {point.split(":")[0] for point in points}
    assert kinds >= {"computing", "log", "saving", "part", "commit", "reading", "handed"}
    assert {point.split(":")[1] for point in points} == set(STAGES)


def test_after_many_deaths_every_stage_ends_with_the_parameters_of_the_run_that_was_left_alone(runs):
    assert tiny.digests(runs.killed) == tiny.digests(runs.whole), runs.points


def saved_before(point: str) -> tuple[str, int]:
    """The stage of a point, and a step of it that was whole by then: a save waits for the one before it."""
    what, stage, step = (*point.split(":"), 0)[:3]
    if what == "row":
        return stage, STEPS[-1]
    if what in ("committed", "saved"):
        return stage, int(step)
    earlier = [0, 0, *(save for save in SAVES if save < int(step))]
    return stage, earlier[-1 if what in SAVING else -2]


def test_what_was_saved_is_never_trained_again(runs):
    *_, last = said = runs.output.split(tiny.KILLED)[1:]
    assert len(said) == DEATHS and "Report:" in last
    for point, text in zip(runs.points, said, strict=True):
        stage, step = saved_before(point)
        resumed = re.search(r"^(\w+): resumes at step (\d+)$", text, re.MULTILINE)
        assert not step or (resumed[1] == stage and int(resumed[2]) >= step), (point, text)


def test_after_many_deaths_optimizers_costs_and_logs_are_those_of_the_run_that_was_left_alone(runs):
    for stage in STAGES:
        metas = [
            Checkpoints(each / stage / "checkpoints", read_only=True).meta(10) for each in (runs.killed, runs.whole)
        ]
        for key in ("opt_digests", "params_digest", "lineage", "digests"):
            assert _apart(metas[0][key]) == _apart(metas[1][key]), (stage, key, runs.points)
        found, expected = (tiny.metrics(each / stage) for each in (runs.killed, runs.whole))
        for key in ("step", "loss", "tokens"):
            assert [line[key] for line in found] == [line[key] for line in expected], (stage, key, runs.points)


def _apart(value):
    """A lineage without what depends on the run's directory and on the clock."""
    if not isinstance(value, list):
        return value
    return [{key: each[key] for key in ("stage", "step", "params_digest", "fresh", "data")} for each in value]


def test_after_many_deaths_nothing_unfinished_is_left(runs):
    left = [str(path.relative_to(runs.killed)) for path in runs.killed.rglob("*") if "-tmp" in path.name]
    assert not left, runs.points
    for stage in STAGES:
        directories = [each / stage / kind for each in (runs.killed, runs.whole) for kind in ("checkpoints", BASE)]
        steps = [sorted(path.name for path in each.glob("*")) for each in directories]
        assert set(steps[0]) >= set(steps[2]) and steps[1] == steps[3], (stage, runs.points)

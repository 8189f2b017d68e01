"""Runs whose loss rises or is no longer finite: what the guard skips, and how a user continues."""

import re

import pytest

from tests.helpers import tiny_run as tiny

pytestmark = pytest.mark.slow

RISES = """c.evaluations = dict()
c.sources.noise = dict(path="json", data_files=dict(train="{noise}"))
guard = dict(deviations=3.0, window=4, accept_after=3, stop_after=3)
c.stages = dict(
    pretrain=dict(c.stages.pretrain.to_dict(), steps=30, guard=guard, data_schedule=[[15, dict(noise=1.0)]]),
    gradual=dict(
        c.stages.finetune.to_dict(), start=dict(stage="pretrain", fresh=["head/.*"]), steps=20,
        train="head/bias", unfreeze=[[10, "all"]], guard=guard,
    ),
)
"""

DIVERGES = """c.evaluations = dict()
c.stages = dict(
    pretrain=dict(c.stages.pretrain.to_dict(), steps=2),
    finetune=dict(
        c.stages.finetune.to_dict(), start=dict(stage="pretrain", fresh=["head/.*"]), train="head/.*",
        unfreeze=[[4, "all"]], save_every=2, guard=dict(stop_after=2), log_every=1,
        optimizer=dict(learning_rate=1e-2, learning_rates=[["layers/.*", RATE]]),
    ),
)
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("diverged")
    tiny.write_texts(directory / "texts")
    return directory


def test_a_guarded_run_trains_through_a_change_of_its_data_and_of_its_trainable_parameters(base):
    noise = base / "noise.jsonl"
    noise.write_text("".join(f'{{"text": "{" ".join(str(n * k % 9973) for n in range(60))}"}}\n' for k in range(1, 40)))
    config = tiny.write_config(base / "rises.py", base, RISES.format(noise=noise))
    tiny.process(("run", f"--config={config}", f"--workdir={base}/rises"))
    for stage, change in (("pretrain", 15), ("gradual", 10)):
        lines = tiny.metrics(base / "rises" / stage)
        trained = [line["step"] for line in lines if line["loss"] is not None]
        assert any(change < step for step in trained), f"{stage}: every step after {change} was skipped"
    before, after = (
        [line["loss"] for line in tiny.metrics(base / "rises" / "pretrain") if low <= line["step"] <= high]
        for low, high in ((10, 15), (16, 18))
    )
    assert min(after) > max(before), "the new data is harder"


def test_the_advice_after_a_divergence_can_be_followed(base):
    file, workdir = base / "diverges.py", base / "diverges"
    run = ("run", f"--config={file}", f"--workdir={workdir}")
    tiny.write_config(file, base, DIVERGES.replace("RATE", "1e30"))
    said = tiny.process(run, status=3).stderr.splitlines()[-1]
    assert "2 steps in a row was not finite (guard.stop_after=2)" in said and "Checkpoint 4 is intact" in said
    start = re.search(r"start=(dict\(.*?\))", said)[1]
    kind = re.search(r"kind='(\w+)'", said)[1]
    more = f"c.stages.calmer = dict(c.stages.finetune.to_dict(), kind={kind!r}, start={start})\n"
    more += 'c.stages.calmer.update(unfreeze=[], train="all")\nc.stages.calmer.optimizer.learning_rates = []'
    tiny.write_config(file, base, DIVERGES.replace("RATE", "1e30") + more)
    tiny.process((*run, "--stages=calmer"))
    assert tiny.metrics(workdir / "calmer")[-1]["step"] == 10
    higher = (*run, "--stages=finetune", "--config.stages.finetune.guard.stop_after=3")
    assert "3 steps in a row" in tiny.process(higher, status=3).stderr

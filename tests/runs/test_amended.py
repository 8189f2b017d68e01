"""A run that its owner changes: the same bits however it is killed in between, and a record of every change."""

import json
import shutil

import pytest

from llm3.checkpoints.stage_checkpoints import Checkpoints
from tests.helpers import tiny_run as tiny

pytestmark = pytest.mark.slow

ALONE = """c.evaluations = dict()
c.stages = dict(pretrain=dict(c.stages.pretrain.to_dict(), steps=6, keep=9))
c.stages.pretrain.data = dict(general=1.0, domain=0.5)
"""


def overrides(**fields) -> list[str]:
    return [f"--config.stages.pretrain.{name.replace('__', '.')}={value}" for name, value in fields.items()]


def test_a_run_amended_three_times_computes_the_same_bits_however_it_is_killed_in_between(tmp_path):
    tiny.write_texts(tmp_path / "texts")
    file = tiny.write_config(tmp_path / "config.py", tmp_path, ALONE)
    one = overrides(steps=12, optimizer__learning_rate=5e-3, guard__deviations=4.0, guard__window=4)
    two = [*one, *overrides(batch_size=12, data={"general": 0.2, "domain": 0.8}, optimizer__clip_norm=0.0, steps=16)]
    three = [*two, *overrides(steps=18, skip_steps=[[13, 14]])]

    def commands(workdir):
        run = ("run", f"--config={file}", f"--workdir={workdir}")
        amendments = (["--amend=first", *one], ["--amend=second", *two], ["--amend=spike", "--from_step=12", *three])
        return [run, *((*run, *each) for each in amendments)]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    tiny.process(*commands(whole))
    first, *later = commands(killed)
    tiny.process(first, later[0], point="SIGKILL@log:pretrain:8", status=-9)
    shutil.rmtree(killed / "pretrain" / "checkpoints" / "6" / "params")  # of the step after which it was amended
    resumed = tiny.process(*later[:2], point="SIGKILL@log:pretrain:14", status=-9).stdout
    assert "step 6 is damaged and was skipped" in resumed and "pretrain: resumes at step 4" in resumed
    tiny.process(*later[1:], point="SIGKILL@saved:pretrain:18", status=-9)
    again, said = tiny.process(later[2], ("lineage", f"--workdir={killed}")).stdout.split(tiny.NEXT)[:2]
    assert "pretrain: resumes at step 18" in again, "the same command does not go back once more"

    newest = [Checkpoints(run / "pretrain" / "checkpoints", read_only=True).meta(18) for run in (whole, killed)]
    for key in ("params_digest", "opt_digests", "steps"):
        assert newest[0][key] == newest[1][key]
    recorded = newest[1]["amendments"]
    assert [(each["step"], each["why"], each["back_from"]) for each in recorded] == [
        (6, "first", None), (12, "second", None), (12, "spike", 16),
    ]  # fmt: skip
    assert recorded[1]["changes"][0] == {"field": "stage.batch_size", "saved": 8, "now": 12}
    record = json.loads((killed / "pretrain" / "config.json").read_text())
    assert record["amendments"] == recorded and record["stage"]["steps"] == 18
    for line in ("after step 6: guard.deviations 0.0 -> 4.0", "after step 12: batch_size 8 -> 12", "back from step 16"):
        assert line in said and line in (killed / "report.md").read_text().replace("\\", "")
    assert (killed / "pretrain" / "set_aside" / "3" / "checkpoints" / "16").is_dir()
    losses = [{line["step"]: line["loss"] for line in tiny.metrics(run / "pretrain")} for run in (whole, killed)]
    assert losses[0][18] == losses[1][18] and losses[0].keys() == {*range(2, 19, 2)}

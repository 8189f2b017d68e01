"""The rows of a run's parents, and their names."""

from llm3.config import load as configfile
from llm3.files import INIT, START
from llm3.stages.parents import first_rows, other_runs, parent_labels
from tests.helpers import tiny_run as tiny

EXTRA = """stages = c.stages.to_dict()
stages["posttrain"] |= dict(start=dict(run="@a/base", stage="pretrain"), data=dict(domain=1.0))
c.stages = {name: stages[name] for name in ("posttrain", "finetune")}
c.tokenizer.path = "@tokenizer.json"
"""


def read(tmp_path, extra: str = ""):
    file = tiny.write_config(tmp_path / "config.py", tmp_path, (EXTRA + extra).replace("@", f"{tmp_path}/"))
    return configfile.load(str(file))


def rows(tmp_path, extra: str = "") -> tuple[list[str], dict[str, str]]:
    config = read(tmp_path, extra)
    return first_rows(config, tmp_path / "run"), parent_labels(config, tmp_path / "run")


def test_the_stage_of_another_run_has_a_row_and_the_untrained_model_only_if_a_stage_starts_from_it(tmp_path):
    first, labels = rows(tmp_path)
    assert first == ["base-pretrain"]
    assert labels == {"posttrain": "base-pretrain", "finetune": "posttrain"}
    first, labels = rows(tmp_path, 'c.stages.scratch = stages["scratch"]')
    assert first == ["base-pretrain", INIT] and labels["scratch"] == INIT


def test_each_parent_has_one_row_and_a_name_of_its_own(tmp_path):
    extra = """def stage(run, stage="pretrain", **more):
    return dict(stages["posttrain"], start=dict(run=f"@{run}", stage=stage, **more))
c.stages.same = stage("a/../a/base")
c.stages.second = stage("b/base")
c.stages.third = stage("c/base", "other")
c.stages["base-other"] = stage("a/base", step=4)
"""
    _, labels = rows(tmp_path, extra)
    assert labels == {
        "posttrain": "base-pretrain",
        "same": "base-pretrain",
        "second": "b-base-pretrain",
        "third": "c-base-other",  # a stage is called base-other
        "base-other": "base-pretrain-4",
        "finetune": "posttrain",
    }
    config = read(tmp_path, extra)
    others = other_runs(config, tmp_path / "run").items()
    assert {row: start.run.resolve().parent.name for row, (_, start) in others} == {
        "base-pretrain": "a", "b-base-pretrain": "b", "c-base-other": "c", "base-pretrain-4": "a",
    }  # fmt: skip


def test_a_run_that_names_itself_has_no_further_row(tmp_path):
    config = read(tmp_path)
    assert other_runs(config, tmp_path / "a" / "base") == {}
    assert parent_labels(config, tmp_path / "a" / "base")["posttrain"] == "pretrain"


def test_a_pretrained_model_has_the_row_start(tmp_path):
    file = tiny.write_config(tmp_path / "config.py", tmp_path, EXTRA.replace("@", f"{tmp_path}/"))
    config = configfile.load(str(file), ["stages.posttrain.start={'model': 'some/model'}"])
    assert first_rows(config, tmp_path / "run") == [START]
    assert parent_labels(config, tmp_path / "run")["posttrain"] == START

"""Hand-offs: every leaf is accounted for, and a parent that does not fit is refused before anything is touched."""

import json
import types

import pytest
import tiny_run as tiny

from llm3 import configfile, handoff, training
from llm3.__main__ import main
from llm3.errors import UserError


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """A run whose pretrain and posttrain stages are finished and whose finetune stage died at step 8."""
    base = tmp_path_factory.mktemp("handoff")
    tiny.write_texts(base / "texts")
    for file in sorted((base / "texts").glob("task-*.jsonl")):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        lines = (json.dumps(row | {"label": f"other {row['label']}"}) + "\n" for row in rows)
        file.with_name(file.name.replace("task", "other")).write_text("".join(lines))
    other = f'{{each: f"{base}/texts/other-{{each}}.jsonl" for each in ("train", "validation", "test")}}'
    extra = f'c.sources.other = dict(path="json", label="label", data_files={other})'
    config, run = tiny.write_config(base / "config.py", base, extra), base / "run"
    point = "SIGKILL@saved:finetune:8"
    tiny.process(base, ("run", f"--config={config}", f"--workdir={run}"), point=point, status=-9)
    return types.SimpleNamespace(config=str(config), run=run)


def start(stage: str, **fields) -> str:
    """An override of finetune's parent, RUN standing for the run's directory."""
    return f"stages.finetune.start={ {'run': 'RUN', 'stage': stage, 'fresh': ['head/.*'], **fields} }"


AS_POSTTRAIN = (
    "stages.finetune.kind=posttrain",
    "stages.finetune.objective=causal",
    "stages.finetune.data={'general': 1.0}",
)
WRONG = {
    "unknown stage": ([start("postrain")], ["'postrain'", "did you mean 'posttrain'"]),
    "run does not exist": ([start("posttrain", run="RUNS")], ["RUNS does not exist", "did you mean 'RUN'"]),
    "step does not exist": ([start("posttrain", step=7)], ["step=7", "holds the steps 8, 10"]),
    "unfinished parent": ([start("finetune", fresh=[])], ["finetune", "step 8 of 10", "finish it"]),
    "another tokenizer": ([start("posttrain"), "tokenizer.vocab_size=290"], ["tokenizer", "RUN/tokenizer.json"]),
    "another width": (
        [start("posttrain"), "model.d_model=32"],
        ["embed/embedding: (300, 32) in this model, (300, 16) in the parent", "layers/mlp/up/kernel"],
    ),
    "other layers": (
        [start("posttrain"), "model.layers=3"],
        ["layers/mlp_norm/scale: (3, 16) in this model, (2, 16) in the parent"],
    ),
    "another leaf": (
        [start("posttrain"), "model.qk_norm=True"],
        ["layers/attention/key_norm/scale (2, 8): not in the parent", "start.fresh"],
    ),
    "head not declared fresh": ([start("posttrain", fresh=[])], ["head/kernel (16, 2): not in the parent", "fresh"]),
    "head left over": (
        [start("finetune", step=8), *AS_POSTTRAIN],
        ["start.fresh", "'head/.*' matches no leaf"],
    ),
    "head not declared dropped": (
        [start("finetune", step=8, fresh=[]), *AS_POSTTRAIN],
        ["head/kernel (16, 2): not in this model", "start.drop"],
    ),
    "fresh matches nothing": ([start("posttrain", fresh=["haed/.*"])], ["start.fresh", "'haed/.*' matches no leaf"]),
    "drop matches nothing": ([start("posttrain", drop=["lm_head/.*"])], ["start.drop", "'lm_head/.*' matches no leaf"]),
    "other classes": (
        [start("finetune", step=8, fresh=[]), "stages.finetune.data={'other': 1.0}"],
        ["['domain', 'general']", "['other domain', 'other general']", "start.fresh"],
    ),
}


@pytest.mark.parametrize(("overrides", "parts"), WRONG.values(), ids=WRONG)
def test_a_wrong_parent_is_refused_by_name_and_leaves_no_trace(capsys, tmp_path, parent, overrides, parts):
    before = tiny.files(parent.run)
    options = [f"--config.{each.replace('RUN', str(parent.run))}" for each in overrides]
    command = ["run", f"--config={parent.config}", f"--workdir={tmp_path / 'child'}", "--stages=finetune"]
    assert main([*command, *options]) == 2
    error = capsys.readouterr().err.replace(str(parent.run), "RUN")
    for part in ["config.stages.finetune.start", *parts]:
        assert part in error
    assert tiny.files(tmp_path) == {} and tiny.files(parent.run) == before


def test_a_parent_in_the_same_run_that_is_not_trained_is_refused(capsys, tmp_path, parent):
    command = ["run", f"--config={parent.config}", f"--workdir={tmp_path}", "--stages=posttrain"]
    assert main(command) == 2
    assert "holds no checkpoints of a stage 'pretrain': train it first" in capsys.readouterr().err
    assert tiny.files(tmp_path) == {}


def test_classes_are_compared_also_with_a_parent_that_is_yet_to_be_trained(capsys, tmp_path, parent):
    """A second fine-tuning stage, in the same run, that would take over the head of the first one."""
    options = ["--config.stages.scratch.start=finetune", "--config.stages.scratch.data={'other': 1.0}"]
    assert main(["run", f"--config={parent.config}", f"--workdir={tmp_path}", *options]) == 2
    error = capsys.readouterr().err
    assert "config.stages.scratch.start" in error and "['other domain', 'other general']" in error
    assert tiny.files(tmp_path) == {}


def test_eval_refuses_another_model_than_the_checkpoint_holds(capsys, parent):
    command = ["eval", f"--config={parent.config}", f"--workdir={parent.run}", "--stages=pretrain"]
    assert main([*command, "--config.model.d_ff=64"]) == 2
    assert "model.d_ff: 32 there, 64 now" in capsys.readouterr().err


def test_generate_refuses_a_stage_that_is_not_there_and_options_out_of_range(capsys, parent):
    command = ["generate", f"--config={parent.config}", f"--workdir={parent.run}", "--prompt=a"]
    for option, part in {
        "--stage=postrain": "did you mean 'posttrain'",
        "--top_p=0": "--top_p=0.0",
        "--temperature=-1": "--temperature=-1.0: expected at least 0",
        "--top_k=-1": "--top_k=-1",
        "--max_tokens=0": "--max_tokens=0: expected at least 1",
    }.items():
        assert main([*command, option]) == 2
        assert part in capsys.readouterr().err


def test_a_stage_with_checkpoints_of_its_own_does_not_look_for_its_parent(tmp_path, parent):
    config = configfile.load(parent.config, ["stages.posttrain.start={'run': '/gone', 'stage': 'pretrain'}"])
    with pytest.raises(UserError, match="/gone does not exist"):
        training.locate_parent(config, tmp_path, "posttrain", [])
    (tmp_path / "posttrain" / "checkpoints" / "4").mkdir(parents=True)
    assert training.locate_parent(config, tmp_path, "posttrain", []) == (None, None)


def test_every_leaf_is_loaded_fresh_or_dropped(tmp_path):
    begin = handoff.Start(tmp_path, "parent", "latest", fresh=("head/.*",), drop=("lm_head/.*",))
    model = {"embed/embedding": (3, 2), "head/kernel": (2, 4), "head/bias": (4,)}
    before = {"embed/embedding": (3, 2), "lm_head/kernel": (2, 3), "head/kernel": (2, 9), "head/bias": (9,)}
    told = handoff.account(model, before, begin, "start")
    assert told.loaded == ("embed/embedding",)
    assert told.fresh == ("head/bias", "head/kernel")
    assert told.dropped == ("head/bias", "head/kernel", "lm_head/kernel")


def test_a_rule_matches_whole_paths(tmp_path):
    begin = handoff.Start(tmp_path, "parent", "latest", fresh=("head",), drop=())
    with pytest.raises(UserError, match="'head' matches no leaf"):
        handoff.account({"head/kernel": (2, 2)}, {}, begin, "start")

"""A stage is not resumed, or shown in a report, beside a parent that is not the one that it was trained from."""

import json

import pytest

from llm3.checkpoints import stage_checkpoints
from llm3.config import load as configfile
from llm3.files import ROW
from llm3.stages.ancestry import changed_parent
from tests.helpers import tiny_run as tiny

AMENDED = {"step": 6, "why": "", "when": "", "changes": [{"field": "stage.steps", "saved": 6, "now": 8}]}


@pytest.fixture
def found(tmp_path, monkeypatch):
    """found(...): what is said of a child, posttrain, whose parent has these files.

    The child began with the parameters "old" of step 4 or 6, of 6 steps. row: its steps and digest. checkpoints: of the
    parent, {step: digest}. steps: that the parent has now.
    """
    metas = {}
    monkeypatch.setattr(stage_checkpoints.Checkpoints, "meta", lambda own, step: metas[own.directory.parent.name, step])

    def save(stage, step, meta):
        (tmp_path / "run" / stage / "checkpoints" / str(step)).mkdir(parents=True)
        metas[stage, step] = meta

    def check(start, row=None, checkpoints=(), steps=6, amendments=(), run=".", label="pretrain"):
        step = start["step"] if isinstance(start, dict) and "step" in start else 6
        parent = {"run": run, "stage": "pretrain", "step": step, "params_digest": "old"}
        lineage = [parent | {"steps": 6}]
        save("posttrain", 2, {"parent": parent, "lineage": lineage, "config": {"stage": {"start": start}}})
        for each, digest in dict(checkpoints).items():
            record = {"stage": {"steps": steps}, "amendments": list(amendments)}
            save("pretrain", each, {"params_digest": digest, "config": record})
        if row:
            (path := tmp_path / "run" / label / ROW).parent.mkdir(parents=True, exist_ok=True)
            digest = {"params_digest": row[1]}
            path.write_text(json.dumps({"steps": row[0], **(digest if label == "pretrain" else {"origin": digest})}))
        file = tiny.write_config(tmp_path / "config.py", tmp_path)
        config = configfile.load(str(file), [f"stages.posttrain.start={start!r}", "stages.posttrain.replay=0.0"])
        return changed_parent(config, tmp_path / "run", "posttrain")

    return check


STEP_4 = {"stage": "pretrain", "step": 4}


@pytest.mark.parametrize(
    ("start", "row", "more"),
    [
        ("pretrain", (6, "old"), {}),
        ("pretrain", None, {}),  # it is gone
        ("pretrain", (6, "old"), {"run": "/where/it/was"}),  # as older versions wrote it, and the run was moved
        (STEP_4, (6, "result"), {"checkpoints": {4: "old", 6: "result"}}),
        (STEP_4, (8, "result"), {"checkpoints": {8: "result"}, "steps": 8, "amendments": [AMENDED]}),
        (STEP_4, (6, "result"), {"checkpoints": {6: "result"}}),
    ],
)
def test_a_parent_that_is_the_same_or_unknown_is_no_matter_for_words(found, start, row, more):
    assert found(start, row, **more) == ""


@pytest.mark.parametrize(
    ("start", "row", "more", "said"),
    [
        ("pretrain", (6, "new"), {}, "(old then, new now)"),
        ("pretrain", (8, "new"), {"run": "/where/it/was"}, "(old then, new now)"),
        ("pretrain", (8, "new"), {"checkpoints": {8: "new"}, "amendments": [AMENDED]}, "(old then, new now)"),
        ("pretrain", None, {"checkpoints": {6: "new"}}, "(old then, new now)"),  # it is being trained again
        (STEP_4, (8, "result"), {"checkpoints": {4: "new", 8: "result"}}, "(old then, new now)"),
        (STEP_4, (8, "result"), {"checkpoints": {8: "result"}, "steps": 8}, "(step 4 of 6 then, step 4 of 8 now)"),
    ],
)
def test_a_parent_that_was_trained_again_is_noticed_also_with_other_steps_or_in_a_moved_run(
    found, start, row, more, said
):
    assert f"posttrain was trained from other parameters of 'pretrain' than its current ones {said}" in found(
        start, row, **more
    )


@pytest.mark.parametrize("digest", ["old", "new"])
def test_a_row_of_another_run_belongs_to_the_parameters_that_a_stage_began_with(found, tmp_path, digest):
    start = {"run": str(tmp_path / "base"), "stage": "pretrain"}
    said = found(start, (8, digest), run=start["run"], label="base-pretrain")
    assert ("of 'base-pretrain' than its current ones (old then, new now)" in said) == (digest == "new")

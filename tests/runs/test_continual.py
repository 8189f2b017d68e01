"""Continual pretraining in a whole run: the rate is warmed anew, the parent's text replayed, and both are told."""

import itertools
import json

import pytest

from tests.helpers import tiny_run

pytestmark = pytest.mark.slow

EXTRA = """
posttrain = c.stages.posttrain
posttrain.data, posttrain.replay = dict(domain=1.0), 0.25
posttrain.log_every = c.stages.pretrain.log_every = 1
posttrain.optimizer = dict(learning_rate=1e-2, warmup_steps=4)
""".strip()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    base = tmp_path_factory.mktemp("continual")
    tiny_run.write_texts(base / "texts")
    train, validation = (base / "texts" / f"domain-{split}.jsonl" for split in ("train", "validation"))
    seen = train.read_text(encoding="utf-8").splitlines()[:2]
    validation.write_text("\n".join([*seen, *validation.read_text(encoding="utf-8").splitlines()[:2]]))
    config = tiny_run.write_config(base / "config.py", base, EXTRA)
    tiny_run.process(("run", f"--config={config}", f"--workdir={base / 'run'}", "--stages=pretrain,posttrain"))
    return base / "run"


def test_the_learning_rate_is_warmed_anew_where_the_parent_had_lowered_it(run):
    parent, child = ([line["learning_rate"] for line in tiny_run.metrics(run / name)] for name in tiny_run.STAGES[:2])
    assert parent[-1] == pytest.approx(1e-3)
    assert child[:4] == pytest.approx([2.5e-3, 5e-3, 7.5e-3, 1e-2])
    assert max(child) == child[3] and child[-1] < child[4]


def test_epochs_of_what_is_replayed_too_are_in_the_log_and_in_the_report(run):
    lines = tiny_run.metrics(run / "posttrain")
    seen = [{key: line[f"epochs_{key}"] for key in ("domain", "general")} for line in lines]
    assert all(before["domain"] < after["domain"] for before, after in itertools.pairwise(seen))
    assert tiny_run.rows(run)["posttrain"]["epochs"] == seen[-1]
    windows = 8 / tiny_run.metrics(run / "pretrain")[0]["epochs_general"]
    assert seen[-1]["general"] * windows == pytest.approx(0.25 * 80, abs=1)
    told = ", ".join(f"{name} {times:.2g}" for name, times in seen[-1].items())
    assert f"- posttrain: {told}" in (run / "report.md").read_text(encoding="utf-8")


def test_what_of_an_evaluation_was_trained_on_is_in_the_report(run):
    matrix = json.loads((run / "matrix.json").read_text(encoding="utf-8"))
    report = (run / "report.md").read_text(encoding="utf-8")
    assert "- overlap: domain: of 4 documents 2 are in the training data, 2 by half or more" in report
    assert "general: of" not in report.split("- overlap: ")[1].splitlines()[0] and matrix["rows"]

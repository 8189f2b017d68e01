"""A parent that vanishes, changes or is damaged while the run of its child is already under way."""

import re
import shutil
import types

import pytest

from llm3.__main__ import main
from tests.helpers import tiny_run as tiny
from tests.helpers.tiny_damage import edited, in_file, truncate

# Orbax leaves coroutines behind when it fails on a damaged file
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning", "ignore:coroutine:RuntimeWarning"
)

DATA = "params/ocdbt.process_0/d/*"
MEANWHILE = {
    "deleted": (lambda found: shutil.rmtree(found.parents[1]), ("the run RUN does not exist",)),
    "its step deleted": (lambda found: shutil.rmtree(found / "10"), ("step 8 of 10", "finish it")),
    "truncated": (in_file(DATA, truncate), ("10/params cannot be read", "restore it from a copy")),
    "other metadata": (
        edited(lambda meta: meta.update(tokenizer_hash="0" * 64), valid_digest=True),
        ("was trained with the tokenizer 000000000000", "tokenizer.path"),
    ),
}


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """A run whose first stage is finished."""
    base = tmp_path_factory.mktemp("handoff")
    tiny.write_texts(base / "texts")
    extra = "c.evaluations = dict(general=c.evaluations.general)"
    config, run = tiny.write_config(base / "config.py", base, extra), base / "run"
    tiny.process(("run", f"--config={config}", f"--workdir={run}", "--stages=pretrain", "--config.evaluations={}"))
    return types.SimpleNamespace(config=config, run=run)


@pytest.mark.parametrize("case", MEANWHILE)
def test_a_parent_that_changes_after_the_preflight_is_rejected_and_no_stage_begins(
    case, capsys, monkeypatch, tmp_path, parent
):
    """It changes after check_before_training found it intact: while the untrained model is evaluated."""
    damage, messages = MEANWHILE[case]
    run, child = tmp_path / "run", tmp_path / "child"
    shutil.copytree(parent.run, run)
    monkeypatch.setattr("llm3.cli.run.evaluate_first_rows", lambda _: damage(run / "pretrain" / "checkpoints"))
    start = {"run": str(run), "stage": "pretrain", "fresh": ["head/.*"]}
    command = ["run", f"--config={parent.config}", f"--workdir={child}", "--stages=finetune"]
    assert main([*command, f"--config.stages.finetune.start={start}"]) == 2
    error = capsys.readouterr().err.replace(str(run), "RUN")
    for part in messages:
        assert re.search(part, error), error
    assert "config.stages.finetune.start" in error
    written = [path for path in tiny.files(child) if "checkpoints/" in path or path.startswith("finetune/")]
    assert written == [], "nothing of the stage"

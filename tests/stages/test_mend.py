"""Damaged files of a run that it can make again are set aside, with a line on each."""

import json

import numpy as np
import pytest

from llm3.checkpoints import metadata, stage_checkpoints
from llm3.checkpoints.orbax_store import DamagedCheckpoint
from llm3.cli import run as verb
from llm3.config import load as configfile
from llm3.distributed.lock import lock
from llm3.errors import UserError
from llm3.files import FORMAT
from llm3.report.logs import read_metrics
from llm3.stages import workdir
from llm3.stages.mend import mend
from llm3.stages.records import read_record, write_record
from tests.helpers import tiny_run as tiny


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run with a finished stage, whose checkpoint 10 knows the record."""
    config = configfile.load(str(tiny.write_config(tmp_path / "config.py", tmp_path)))
    record, stage = workdir.stage_record(config, "pretrain"), tmp_path / "run" / "pretrain"
    (stage / "checkpoints" / "10").mkdir(parents=True)
    monkeypatch.setattr(stage_checkpoints.Checkpoints, "meta", lambda *_: {"config": record})
    (stage / "predictions").mkdir()
    (stage / "predictions" / "task.parquet").write_text("PAR1 columns PAR1")
    for name in ("config.json", "evaluation.json", "details.json"):
        (stage / name).write_text(json.dumps(record))
    for name in ("matrix.json", "tokenizer.json", "sessions.json", "config.resolved.json"):
        (stage.parent / name).write_text(json.dumps(record))
    (stage / "metrics.jsonl").write_text('{"step": 1}\n{"step": 10}\n{"step": 11')
    return tmp_path / "run", config, record


def test_intact_files_stay_as_they_are(run):
    before = tiny.files(run[0])
    assert mend(run[0], ["init", "pretrain"]) == [] and tiny.files(run[0]) == before


def test_what_another_run_trains_is_left_to_it(run):
    (run[0] / "pretrain" / "evaluation.json").write_text("")
    before = tiny.files(run[0])
    with lock(run[0] / "pretrain"):
        assert mend(run[0], ["pretrain"]) == [] and tiny.files(run[0]) == before
    assert len(mend(run[0], ["pretrain"])) == 1


@pytest.mark.parametrize(
    ("damaged", "gone"),
    [
        ("matrix.json", ["matrix.json"]),
        ("tokenizer.json", ["tokenizer.json"]),
        ("config.resolved.json", ["config.resolved.json"]),
        ("pretrain/evaluation.json", ["pretrain/evaluation.json", "pretrain/details.json"]),
        ("pretrain/predictions/task.parquet", ["pretrain/evaluation.json", "pretrain/predictions/task.parquet"]),
        ("pretrain/details.json", ["pretrain/evaluation.json", "pretrain/details.json"]),
    ],
)
def test_a_damaged_file_is_kept_aside_and_made_again(run, damaged, gone):
    (run[0] / damaged).write_text("")
    (said,) = mend(run[0], ["pretrain"])
    assert f"{damaged} cannot be read: it is kept as {damaged.split('/')[-1]}.damaged, and written again" in said
    for name in gone:
        assert not (run[0] / name).exists() and (run[0] / f"{name}.damaged").is_file()


@pytest.mark.parametrize("damage", [None, "", "[]x"])
def test_a_record_is_written_again_from_the_newest_checkpoint(run, damage):
    directory, config, record = run
    path = directory / "pretrain" / "config.json"
    path.unlink() if damage is None else path.write_text(damage)
    workdir.check_record(directory, config, "pretrain")
    changed = configfile.load(str(directory.parent / "config.py"), ["model.rope_theta=5.0"])
    assert [each.field for each in workdir.record_changes(directory, changed, "pretrain")] == ["model.rope_theta"]
    assert len(mend(directory, ["pretrain"])) == 1 and read_record(directory, "pretrain") == record
    assert (directory / "pretrain" / "evaluation.json").is_file()


def test_what_cannot_be_made_again_is_left_out(run):
    (run[0] / "sessions.json").write_text("[")
    assert [each.rpartition(", ")[2] for each in mend(run[0], ["pretrain"])] == ["and the report does without"]


@pytest.mark.parametrize("damaged", ['{"st\x00', '{"stmp": 1}', '{"step": "1"}', "1"])
def test_a_damaged_line_of_metrics_is_left_out(run, damaged):
    path = run[0] / "pretrain" / "metrics.jsonl"
    text = path.read_text().replace('{"step": 1}', damaged)
    path.write_text(text)
    (said,) = mend(run[0], ["pretrain"])
    assert "1 of 3 lines cannot be read" in said and path.with_name("metrics.jsonl.damaged").read_text() == text
    assert read_metrics(path.parent) == [{"step": 10}]


def test_a_record_of_a_newer_version_is_refused(run):
    write_record(run[0], "pretrain", run[2])
    assert read_record(run[0], "pretrain") == run[2]
    write_record(run[0], "pretrain", run[2] | {"format": FORMAT + 1})
    with pytest.raises(UserError, match=rf"config\.json has format {FORMAT + 1}, and this llm3 reads up to {FORMAT}"):
        workdir.check_record(run[0], run[1], "pretrain")


@pytest.mark.parametrize(("text", "last"), [(None, 0), ("", 0), ('{"step": 4}\n', 4), ('{"step": 4}\n{"step": 10', 4)])
def test_a_finished_stage_whose_metrics_end_before_its_checkpoint_says_which_lines_are_lost(run, text, last):
    path = run[0] / "pretrain" / "metrics.jsonl"
    path.unlink() if text is None else path.write_text(text)
    assert mend(run[0], ["pretrain"]) == [f"{path}: the lines after step {last}, up to step 10, are lost"]


def test_metadata_of_a_newer_version_is_refused_and_not_taken_for_damage(tmp_path, monkeypatch):
    monkeypatch.setattr(metadata, "FORMAT", FORMAT + 1)
    with stage_checkpoints.Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(2, {"kernel": np.zeros(2, np.float32)}, {}, {})
    with pytest.raises(UserError, match=f"has format {FORMAT + 1}, and this llm3 reads up to {FORMAT}") as raised:
        stage_checkpoints.Checkpoints(tmp_path / "checkpoints", read_only=True).newest_meta()
    assert not isinstance(raised.value, DamagedCheckpoint)


def test_a_run_is_not_complete_without_a_row_that_the_report_has(run, monkeypatch):
    directory, config, _ = run
    for name, result in {"first_rows": ["init"], "unreadable": "", "is_current": True}.items():
        monkeypatch.setattr(verb, name, lambda *_, result=result: result)
    rows = [{"stage": name} for name in ("init", "pretrain")]
    (directory / "matrix.json").write_text(json.dumps({"rows": rows, "baselines": []}))
    (directory / "report.html").touch()
    (directory / "init").mkdir()
    assert not verb.is_complete(config, directory, ["pretrain"])
    (directory / "init" / "evaluation.json").write_text("{}")
    assert verb.is_complete(config, directory, ["pretrain"])

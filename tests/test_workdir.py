"""A run's directory: one writer at a time, one config for each stage."""

import fcntl
import json

import pytest
import tiny_run as tiny

from llm3 import configfile
from llm3 import workdir as workdirs
from llm3.__main__ import main
from llm3.errors import UserError


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    directory = tmp_path_factory.mktemp("workdir")
    return str(tiny.write_config(directory / "config.py", directory))


@pytest.fixture
def begun(tmp_path, file):
    """The directory of a run whose pretrain stage has begun."""
    record = workdirs.stage_record(configfile.load(file), "pretrain")
    workdirs.write_json(tmp_path / "pretrain" / workdirs.RECORD, record)
    return tmp_path


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("stages.pretrain.steps=11", "stage.steps: 10 there, 11 now"),
        ("model.d_ff=64", "model.d_ff: 32 there, 64 now"),
        ("seed=1", "seed: 0 there, 1 now"),
        ("tokenizer.vocab_size=301", "tokenizer.vocab_size: 300 there, 301 now"),
        ("sources.general.max_documents=3", "sources.general.max_documents: 0 there, 3 now"),
    ],
)
def test_a_directory_of_another_config_is_refused_and_left_alone(capsys, begun, file, override, line):
    before = tiny.files(begun)
    assert main(["run", f"--config={file}", f"--workdir={begun}", f"--config.{override}"]) == 2
    error = capsys.readouterr().err
    assert "holds 'pretrain' of another config" in error and line in error and "--workdir" in error
    assert tiny.files(begun) == before


def test_the_untrained_model_and_the_tokenizer_belong_to_one_config_too(capsys, tmp_path, file):
    config = configfile.load(file)
    workdirs.write_json(tmp_path / "init" / workdirs.RECORD, workdirs.stage_record(config, "init"))
    changed = "--config.tokenizer.vocab_size=301"
    assert main(["run", f"--config={file}", f"--workdir={tmp_path}", "--stages=pretrain", changed]) == 2
    assert "holds 'init' of another config" in capsys.readouterr().err


@pytest.mark.parametrize(
    "override",
    [
        "stages.pretrain.save_every=5",
        "stages.pretrain.log_every=1",
        "stages.pretrain.keep=9",
        "stages.finetune.steps=99",
        "mesh.fsdp=2",
        "sources.task.max_documents=9",
    ],
)
def test_what_does_not_change_a_stage_may_change_between_two_starts(begun, file, override):
    config = configfile.load(file, [override])
    if override.startswith("sources.task"):
        config = configfile.load(file, [override, "evaluations={}"])
        record = workdirs.stage_record(configfile.load(file, ["evaluations={}"]), "pretrain")
        workdirs.write_json(begun / "pretrain" / workdirs.RECORD, record)
    workdirs.check_record(begun, config, "pretrain")


def test_a_directory_in_use_is_refused_with_the_number_of_the_process(capsys, tmp_path, file):
    with workdirs.lock(tmp_path):
        assert main(["run", f"--config={file}", f"--workdir={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path} is in use by process" in error and "?" not in error


def test_a_lock_of_a_process_that_died_holds_nobody_up(tmp_path):
    (tmp_path / ".lock").write_text("12345")
    with workdirs.lock(tmp_path), open(tmp_path / ".lock") as handle, pytest.raises(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with workdirs.lock(tmp_path):
        pass


def test_a_workdir_that_cannot_be_made_is_refused(capsys, tmp_path, file):
    (tmp_path / "file").write_text("")
    assert main(["run", f"--config={file}", f"--workdir={tmp_path / 'file'}"]) == 2
    assert f"--workdir={tmp_path / 'file'}" in capsys.readouterr().err


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a" / "b.json"
    workdirs.write_json(path, {"x": 1})
    with pytest.raises(TypeError):
        workdirs.write_json(path, {"x": object()})
    assert workdirs.read_json(path) == {"x": 1} and json.loads(path.read_text()) == {"x": 1}
    assert workdirs.read_json(tmp_path / "none.json") is None


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / "record.json").write_text("{")
    with pytest.raises(UserError, match=r"record\.json cannot be read"):
        workdirs.read_json(tmp_path / "record.json")


def test_differences_name_the_field():
    before, now = {"a": {"b": 1, "c": 2}, "d": [1]}, {"a": {"b": 1, "c": 3}, "d": [2], "e": None}
    assert workdirs.differences(before, now) == ["  a.c: 2 there, 3 now", "  d: [1] there, [2] now"]

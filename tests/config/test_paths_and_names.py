"""Names are never paths, a leading "~" is the home directory, and a place that is not on this machine is refused."""

import os
import pathlib

import pytest

from llm3.__main__ import main
from llm3.config import load as configfile
from llm3.data.sources.split import expanded, use_local_copy
from llm3.errors import UserError
from llm3.files import local_path
from llm3.handoff.start import read_start
from llm3.stages.experiment import read_library
from llm3.stages.tokenizer import load_tokenizer
from tests.helpers import tiny_run as tiny


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    directory = tmp_path_factory.mktemp("names")
    return str(tiny.write_config(directory / "config.py", directory))


STAGE = dict(kind="pretrain", data=dict(general=1.0), steps=1, batch_size=8, sequence_length=32)
TEXT = dict(path="text", data_files="x")
TASK = dict(kind="classification", source="task", split="test")
WRONG_NAMES = [
    (f"stages={{'..': {STAGE}}}", ["config.stages: '..' cannot be a name"]),
    (f"stages={{'a/b': {STAGE}}}", ["config.stages: 'a/b' cannot be a name", "'a_b'"]),
    (f"stages={{'.lock': {STAGE}}}", ["config.stages: '.lock' cannot be a name", "'lock'"]),
    (f"stages={{7: {STAGE}}}", ["config.stages: 7 cannot be a name"]),
    (f"stages={{'cache': {STAGE}}}", ["config.stages.cache: cannot be a stage's name"]),
    (f"stages={{'figures': {STAGE}}}", ["config.stages.figures: cannot be a stage's name"]),
    (f"sources={{'../x': {TEXT}}}", ["config.sources: '../x' cannot be a name", "'x'"]),
    (f"evaluations={{'a b': {TASK}}}", ["config.evaluations: 'a b' cannot be a name", "'a_b'"]),
    ("stages.finetune.adapters={'../../x': {'rank': 2}}", ["config.stages.finetune.adapters: '../../x' cannot be"]),
    ("stages.finetune.start={'run': 'r', 'stage': '../x'}", ["config.stages.finetune.start.stage: '../x' cannot be"]),
]


@pytest.mark.parametrize(("override", "parts"), WRONG_NAMES, ids=[parts[0] for _, parts in WRONG_NAMES])
def test_a_name_that_is_a_path_is_refused_and_leaves_no_trace(capsys, tmp_path, file, override, parts):
    assert main(["run", f"--config={file}", f"--workdir={tmp_path / 'run'}", f"--config.{override}"]) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in parts), error
    assert tiny.files(tmp_path) == {}


@pytest.mark.parametrize("name", ["med-qa", "v1.5_b", "médecine", "2024"])
def test_letters_digits_and_three_marks_are_names(file, name):
    assert name in configfile.load(file, [f"evaluations={{'{name}': {TASK}}}"]).evaluations


ELSEWHERE = [
    ["--workdir=az://bucket/run"],
    ["--workdir=run", "--config.cache_dir=s3://bucket/cache"],
    ["--workdir=run", "--config.data_dir=hf://data"],
    ["--workdir=run", "--config.tokenizer.path=https://host/tokenizer.json"],
    ["--workdir=run", "--config.tokenizer.chat_template=gs://b/chat.jinja"],
    ["--workdir=run", "--config.stages.posttrain.start={'run': 'az://b/run', 'stage': 'pretrain'}"],
]


@pytest.mark.parametrize("arguments", ELSEWHERE, ids=[arguments[-1] for arguments in ELSEWHERE])
def test_a_place_on_another_machine_is_refused_at_once(capsys, tmp_path, monkeypatch, file, arguments):
    monkeypatch.chdir(tmp_path)
    assert main(["run", f"--config={file}", *arguments]) == 2
    error = capsys.readouterr().err
    assert "is not supported; expected a path on this machine" in error and "://" in error
    assert list(tmp_path.iterdir()) == []


def test_the_config_and_the_target_of_an_export_are_on_this_machine_too(capsys, tmp_path, monkeypatch, file):
    monkeypatch.chdir(tmp_path)
    export = ["export", "--workdir=x", "--stage=y", "--to=s3://b"]
    for command in (["run", "--config=gs://b/c.py", "--workdir=x"], export):
        assert main(command) == 2
        assert "is not supported" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_tilde_is_the_home_directory_wherever_a_path_is_named(tmp_path, monkeypatch, file):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert local_path("~/run", "--workdir") == tmp_path / "run"
    assert read_start({"run": "~/run", "stage": "a"}, pathlib.Path(), "start").run == tmp_path / "run"
    (tmp_path / "c.py").write_text(pathlib.Path(file).read_text())
    config = configfile.load("~/c.py", ["cache_dir=~/cache", "data_dir=~/data", "sources.general.local=g"])
    (tmp_path / "data" / "g").mkdir(parents=True)
    (tmp_path / "data" / "g" / "train.jsonl").write_text('{"text": "a"}\n')
    copy = use_local_copy(config.sources["general"], config.data_dir)
    assert copy.data_files == {"train": str(tmp_path / "data" / "g" / "train.jsonl")}
    source = expanded(config.sources["task"].__class__("~/folder", data_files={"train": ["~/a", "b"]}, data_dir="~"))
    assert (source.path, source.data_dir) == (f"{tmp_path}/folder", str(tmp_path))
    assert source.data_files == {"train": [f"{tmp_path}/a", "b"]}
    library = read_library(config, tmp_path / "run")
    assert library.cache_dir == tmp_path / "cache"
    library.tokenizer.save(tmp_path / "tokenizer.json")
    named = configfile.load("~/c.py", ["tokenizer.path=~/tokenizer.json"])
    assert load_tokenizer(named, {}, tmp_path / "run", tmp_path / "cache").hash == library.tokenizer.hash
    assert not os.path.exists("~")


def test_the_home_of_nobody_and_an_empty_path_are_refused():
    with pytest.raises(UserError, match=r"--to='~no_such_user/x': "):
        local_path("~no_such_user/x", "--to")
    with pytest.raises(UserError, match="--workdir is empty: expected a path"):
        local_path("", "--workdir")

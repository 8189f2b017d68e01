"""The verb `init`: it sees what is in files, and writes a config that runs as it is."""

import csv
import json
import re
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from llm3.__main__ import main
from llm3.cli.init import init
from llm3.errors import UserError
from llm3.stages import rules
from llm3.stages.experiment import prepare
from llm3.stages.origin import load_config
from tests.helpers.tiny_run import documents

WORDS = ("red", "green", "blue")


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Files of several formats in the working directory."""
    monkeypatch.chdir(tmp_path)
    texts = documents()
    (tmp_path / "general.txt").write_text("\n\n".join(texts[:100]), encoding="utf-8")
    (tmp_path / "books").mkdir()
    for split, some in (("train", texts[:60]), ("valid", texts[60:80])):
        (tmp_path / f"books/a-{split}.txt").write_text("\n".join(some), encoding="utf-8")
    table = {"id": list(range(60)), "title": [text[:9] for text in texts[:60]], "abstract": texts[100:160]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "domain.parquet")
    with open(tmp_path / "task.csv", "w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file, delimiter=";")
        lines.writerow(["nr", "Subject", "Topic"])
        lines.writerows([i, f"{WORDS[i % 3]} {text[:50]}", WORDS[i % 3]] for i, text in enumerate(texts[:90]))
    write_rows(tmp_path / "two.jsonl", [{"text": t, "kind": "ab"[i % 2], "part": "xy"[i % 2]} for i, t in numbered()])
    write_rows(tmp_path / "qa.jsonl", [{"question": text[:30], "answer": text[30:60]} for text in texts[:60]])
    turns = [[{"role": "user", "content": t[:30]}, {"role": "assistant", "content": t[30:60]}] for t in texts[:60]]
    write_rows(tmp_path / "chats.jsonl", [{"source": "me", "messages": each} for each in turns])
    return tmp_path


def numbered():
    return enumerate(documents()[:60])


def write_rows(path, found):
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")


@pytest.mark.parametrize(
    ("flags", "stages", "fields"),
    [
        (
            dict(general="books"),
            ["pretrain"],
            {"general": dict(data_files={"train": "books/a-train.txt", "validation": "books/a-valid.txt"})},
        ),
        (
            dict(general="general.txt", domain="domain.parquet"),
            ["pretrain", "posttrain"],
            {"general": dict(sample_by="paragraph"), "domain": dict(path="parquet", text="abstract")},
        ),
        (
            dict(general="general.txt", task="task.csv"),
            ["pretrain", "finetune"],
            {"task": dict(path="csv", text="Subject", label="Topic", validation_share=0.2)},
        ),
        (dict(template="classify", task="two.jsonl", label="part"), ["pretrain", "finetune"], {}),
        (
            dict(general="general.txt", domain="domain.parquet", task="qa.jsonl"),
            ["pretrain", "posttrain", "finetune"],
            {"task": dict(prompt="question", answer="answer")},
        ),
        (dict(general="books", task="chats.jsonl"), ["pretrain", "finetune"], {"task": dict(messages="messages")}),
    ],
    ids=["pretrain-folder", "domain-parquet", "classify-csv", "classify-alone", "chat-answers", "chat-turns"],
)  # fmt: skip
def test_a_config_has_what_can_be_seen_in_the_files_and_can_be_planned(files, capsys, flags, stages, fields):
    assert init(**flags) == 0
    said = capsys.readouterr().out
    assert "python -m llm3 data --config=my_config.py" in said
    config = load_config("my_config.py")
    order = rules.chosen(config, None)
    assert order == stages
    for source, expected in fields.items():
        for field, value in expected.items():
            assert getattr(config.sources[source], field) == value
    found = prepare(config, files, order)
    assert all(stage.data.mixture.batch(0).weights.sum() > 0 for stage in found.stages.values())
    assert {each.name for each in found.evaluations} == set(config.evaluations)


def test_a_config_is_short_and_formatted(files):
    init(general="general.txt", domain="domain.parquet", task="task.csv")
    text = (files / "my_config.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 55
    ruff = [sys.executable, "-m", "ruff", "format", "--diff", "--isolated", "--line-length=120", "my_config.py"]
    done = subprocess.run(ruff, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--task=two.jsonl",
            r"the label may be 'kind' \(2 classes\) or 'part' \(2 classes\): choose with --label=kind",
        ),
        ("--task=two.jsonl --label=knd", "--label=knd: no such column; did you mean 'kind'"),
        ("--task=chats.jsonl", "--general: a chat model first learns from running text"),
        ("--task=task.csv --template=chat --general=general.txt", "no columns with questions and answers"),
        ("--task=tsk.csv", "--task=tsk.csv: no such file or folder; did you mean 'task.csv'"),
        ("--general=.", "holds files of several formats"),
        ("--domain=general.txt", "init --template=domain: expected --general=FILE or FOLDER as well"),
        ("--template=clasify --task=task.csv", "did you mean 'classify'"),
        ("--general=general.txt --out=task.csv", "--out=task.csv exists"),
        ("--general=general.txt --out=config.txt", "expected a file that ends in .py"),
        ("", "expected files, as --general=FILE"),
    ],
)
def test_what_the_files_do_not_tell_is_refused_with_the_flag_that_tells_it(files, capsys, flags, message):
    before = (files / "task.csv").read_bytes()
    assert main(["init", *flags.split()]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (files / "my_config.py").exists() and (files / "task.csv").read_bytes() == before


def test_columns_that_are_equally_long_are_both_offered(files):
    write_rows(
        files / "pairs.jsonl", [{"first": t[:50], "second": t[50:100], "label": "ab"[i % 2]} for i, t in numbered()]
    )
    with pytest.raises(UserError, match=r"--text=first, or take both with --text='{first} {second}'"):
        init(task="pairs.jsonl")
    init(task="pairs.jsonl", text="{first} {second}")
    assert load_config("my_config.py").sources["task"].text == "{first} {second}"

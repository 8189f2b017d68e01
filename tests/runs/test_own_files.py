"""A newcomer with three files of their own: the README shows the commands and the config."""

import csv
import json
import re

import pytest

from llm3.cli.init import init
from tests.helpers import tiny_run as tiny

PAGE = (tiny.ROOT / "README.md").read_text(encoding="utf-8").partition("## Your own files")[2]


def block(language: str) -> str:
    """The first code block of the section in a language."""
    return re.search(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)[1]


def rows_of(name: str) -> list[dict]:
    return [json.loads(line) for line in (tiny.DATA / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The files of the section, from excerpts of real text, and new rows without labels."""
    monkeypatch.chdir(tmp_path)
    texts = [row["text"] for row in rows_of("general/train.jsonl")]
    (tmp_path / "general.txt").write_text("\n\n".join(texts), encoding="utf-8")
    answers = rows_of("medical/medquad/train.jsonl")
    lines = "".join(json.dumps({"text": row["answer"]}) + "\n" for row in answers)
    (tmp_path / "domain.jsonl").write_text(lines, encoding="utf-8")
    labelled = [[row["answer"][:300], row["question_type"]] for row in answers]
    write_csv(tmp_path / "task.csv", [["text", "label"], *labelled])
    new = [[row["answer"][:300]] for row in rows_of("medical/medquad/test.jsonl")]
    write_csv(tmp_path / "new.csv", [["text"], *new])
    return tmp_path


def write_csv(path, lines):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(lines)


def test_the_readme_shows_the_config_that_init_writes(files):
    init(general="general.txt", domain="domain.jsonl", task="task.csv")
    docstring, _, rest = (files / "my_config.py").read_text(encoding="utf-8").partition('"""\n\n')
    assert docstring.startswith('"""') and rest == block("python"), "put it into the README"


@pytest.mark.slow
def test_at_most_six_commands_lead_from_three_files_to_labels_of_new_rows(files):
    commands = [line.split()[3:] for line in block("bash").splitlines()]
    assert len(commands) <= 6 and [words[0] for words in commands][-3:] == ["run", "report", "predict"]
    # fewer steps than the config has: how well the labels are learnt is not asked
    few = [f"--config.stages.{stage}.steps=12" for stage in ("pretrain", "posttrain", "finetune")]
    tiny.process(*(words + few * (words[0] == "run") for words in commands))
    assert {"pretrain", "posttrain", "finetune"} <= set(tiny.rows(files / "runs" / "my_config"))
    with open(files / "new.csv", newline="") as given, open(files / "labels.csv", newline="") as made:
        assert [row["text"] for row in csv.DictReader(made)] == [row["text"] for row in csv.DictReader(given)]

"""The verb `overlap` shows the passages that evaluations share with the training data, and writes what to leave out."""

import json
import re

import pytest

from llm3.__main__ import main
from llm3.data.tokenizer import Tokenizer
from llm3.errors import Exit
from tests.helpers import tiny_run


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Texts of which two of the general training documents are also in the evaluation of the domain, one within."""
    base = tmp_path_factory.mktemp("overlap")
    tiny_run.write_texts(base / "texts")
    texts = [json.loads(line)["text"] for line in (base / "texts" / "general-train.jsonl").read_text().splitlines()]
    rows = [texts[3], f"It begins otherwise: {texts[5][:80].strip()} and ends so.", "quite different"]
    (base / "texts" / "domain-validation.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    tiny_run.write_config(base / "config.py", base, "del c.evaluations['task'], c.evaluations['general']")
    return base


def call(capsys, base, *arguments, status=0):
    assert main(["overlap", f"--config={base / 'config.py'}", "--stages=pretrain,posttrain", *arguments]) == status
    return capsys.readouterr()


def counts(out):
    """(documents, equal, near duplicates, any n-gram) of the evaluation."""
    return tuple(map(int, re.search(r"^ domain +(\d+) +(\d+) +(\d+) +(\d+) *$", out, re.MULTILINE).groups()))


def test_shared_passages_are_shown_and_a_run_without_the_listed_documents_shares_none(capsys, base, monkeypatch):
    file = base / "overlap.jsonl"
    out = call(capsys, base, "--show=2", f"--drop={file}").out
    assert counts(out)[:2] == (3, 1) and counts(out)[3] == 2
    shown = out[out.index("domain row 0, 100.0 % of its 13-grams; most of them in general row 3") :]
    lines = [line for line in shown.splitlines() if line.startswith("  | ")]
    assert len(lines) == 4 and all("«" in line and "»" in line for line in lines)
    inside = lines[2:]
    assert "otherwise: «" in inside[0] and "» and ends so." in inside[0] and inside[1].startswith("  | «")
    listed = [json.loads(line) for line in file.read_text().splitlines()]
    assert {("general", 3), ("general", 5)} <= {(each["source"], each["row"]) for each in listed} and len(listed) < 6
    [fields] = re.findall(r"Leave these documents out with (.*)$", out, re.MULTILINE)
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda *_: pytest.fail("tokenized again"))
    out = call(capsys, base, *fields.split(), f"--drop={base / 'again.jsonl'}").out
    assert counts(out) == (3, 0, 0, 0) and "  | " not in out
    assert "No training document has to be left out" in out and not (base / "again.jsonl").exists()
    refused = call(capsys, base, f"--drop={file}", status=Exit.BAD_INPUT).err
    assert "exists already; expected the name of a new file" in refused


def test_a_file_of_documents_to_leave_out_is_read_by_content(capsys, base):
    file = base / "mine.jsonl"
    field = f"--config.sources.general.drop={file}"
    assert "No such file" in call(capsys, base, field, status=Exit.BAD_INPUT).err
    file.write_text('{"row": 3}\n')
    assert "expected JSON lines with a hash" in call(capsys, base, field, status=Exit.BAD_INPUT).err
    call(capsys, base, f"--drop={base / 'all.jsonl'}", "--show=0")
    lines = (base / "all.jsonl").read_text().splitlines()
    first = [line for line in lines if json.loads(line)["row"] == 3]
    file.write_text("\n".join(first))
    out = call(capsys, base, field, "--show=0", f"--drop={base / 'both.jsonl'}").out
    assert counts(out)[1] == 0 < counts(out)[3] and f"general: {len(lines) - 1} of" in out
    assert (base / "both.jsonl").read_text().splitlines() == first + [line for line in lines if line not in first]

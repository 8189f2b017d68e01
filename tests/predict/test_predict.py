"""`predict`: a row out for each row in, in files of any kind; runs that are stopped, resumed, and refused."""

import csv
import io
import json
import types

import pyarrow.parquet as pq
import pytest

from llm3.config.data_schema import SourceConfig
from llm3.predict.kinds import labels
from llm3.predict.output import Output
from tests.helpers import tiny_cluster
from tests.helpers import tiny_predict as tiny
from tests.helpers.tiny_run import files

GOOD = [{"id": i, "body": "fox " * (i + 1), "kind": "x"} for i in range(5)]
BAD = [
    (b"not json\n", "not JSON"),
    ({"id": 7}, "no field 'body'"),
    ({"id": 8, "body": None}, "body is null"),
    ({"id": 9, "body": " "}, "body is empty"),
    ({"id": 10, "body": 3}, "body is of type int, not a text"),
    (b'{"body": "\xff"}\n', "not UTF-8"),
    ({"id": 12, "body": "\ud800"}, "body is not valid Unicode"),
    (b"[1]\n", "not a JSON object"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A classifier, and the predictions of the good rows."""
    directory = tmp_path_factory.mktemp("labels")
    workdir = tiny.write(directory / "run", "labels")
    return types.SimpleNamespace(workdir=workdir, expected=tiny.predicted(workdir, GOOD))


def test_each_row_keeps_its_place_and_a_bad_one_says_why_it_has_no_prediction(run, tmp_path):
    rows = [row for pair in zip((each for each, _ in BAD), GOOD * 2, strict=False) for row in pair]
    (tmp_path / "in.jsonl").write_bytes(tiny.lines(rows))
    assert tiny.predict(run.workdir, tmp_path / "in.jsonl", tmp_path / "out.jsonl") == 0
    found = tiny.read(tmp_path / "out.jsonl")
    assert [row["error"] for row in found[::2]] == [reason for _, reason in BAD]
    assert all(row["label"] is row["probability"] is row["truncated"] is None for row in found[::2])
    assert [row.get("id") for row in found[2:10:2]] == [7, 8, 9, 10]
    for row, given in zip(found[1::2], GOOD * 2, strict=False):
        expected = run.expected[given["id"]]
        assert row == expected | {"probability": pytest.approx(expected["probability"], rel=1e-5)}


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_files_of_every_kind_carry_the_same_predictions(run, tmp_path, kind):
    """jsonl -> csv or parquet -> jsonl."""
    (tmp_path / "in.jsonl").write_bytes(tiny.lines(GOOD))
    between = tmp_path / f"out.{kind}"
    assert tiny.predict(run.workdir, tmp_path / "in.jsonl", between, "--probabilities") == 0
    columns = ["id", "body", "kind", "label", "probability", "probabilities", "truncated", "error"]
    if kind == "csv":
        table = list(csv.DictReader(io.StringIO(between.read_text())))
        assert list(table[0]) == columns and [row["error"] for row in table] == [""] * 5
        found = [(int(row["id"]), row["label"], float(row["probability"])) for row in table]
        assert set(json.loads(table[0]["probabilities"])) == set(tiny.LABELS)
    else:
        table = pq.read_table(between)
        assert table.column_names == columns and str(table.schema.field("id").type) == "int64"
        found = [(row["id"], row["label"], round(row["probability"], 6)) for row in table.to_pylist()]
    assert found == [(row["id"], row["label"], pytest.approx(row["probability"], rel=1e-4)) for row in run.expected]
    assert tiny.predict(run.workdir, between, tmp_path / "again.jsonl", "--keep=id,label") == 0
    again = tiny.read(tmp_path / "again.jsonl")
    assert list(again[0]) == ["id", "input_label", "label", "probability", "truncated", "error"]
    assert [row["input_label"] for row in again] == [row["label"] for row in again]


@pytest.mark.parametrize("plain", [False, True], ids=["json", "text"])
def test_standard_input_streams_rows_to_standard_output_and_nothing_else(run, monkeypatch, capsys, plain):
    texts = [row["body"] for row in GOOD] + ([""] if plain else [])
    content = "".join(f"{text}\n" for text in texts).encode() if plain else tiny.lines(GOOD)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert tiny.predict(run.workdir, "-", "-", "--keep=none") == 0
    said = capsys.readouterr()
    found = [json.loads(line) for line in said.out.splitlines()]
    assert [row["label"] for row in found[:5]] == [row["label"] for row in run.expected]
    assert [row["error"] for row in found] == [None] * 5 + ["body is empty"] * plain
    assert "rows/s" in said.err


def test_a_stopped_command_resumes_and_ends_with_the_same_bytes(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(labels, "ROWS", 2)
    rows = [row | {"id": i} for i, row in enumerate(GOOD * 2)]
    (tmp_path / "in.jsonl").write_bytes(tiny.lines(rows))
    arguments = (run.workdir, tmp_path / "in.jsonl")
    assert tiny.predict(*arguments, tmp_path / "whole.csv") == 0
    write, written = Output.write, []

    def stop_at(part):
        def patched(output, number, rows):
            if number == part:
                raise KeyboardInterrupt
            written.append(number)
            write(output, number, rows)

        return patched

    for part in (2, 4):
        monkeypatch.setattr(Output, "write", stop_at(part))
        assert tiny.predict(*arguments, tmp_path / "out.csv") == 130
        assert "rerun the command to resume" in capsys.readouterr().err
        assert not (tmp_path / "out.csv").exists()
    monkeypatch.setattr(Output, "write", stop_at(None))
    assert tiny.predict(*arguments, tmp_path / "out.csv") == 0
    assert written == [0, 1, 2, 3, 4] and "resumes at row 8" in capsys.readouterr().err
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    before = files(tmp_path)
    assert not any(".parts" in name for name in before)
    assert tiny.predict(*arguments, tmp_path / "out.csv") == 0
    assert "nothing left to do" in capsys.readouterr().err and files(tmp_path) == before


def test_an_output_of_anything_else_is_never_overwritten(run, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_bytes(tiny.lines(GOOD))
    (tmp_path / "mine.jsonl").write_text("mine")
    (tmp_path / "out.jsonl").write_bytes((run.workdir.parent / "out.jsonl").read_bytes())
    about = (run.workdir.parent / "out.jsonl.provenance.json").read_text()
    (tmp_path / "out.jsonl.provenance.json").write_text(about)
    before = files(tmp_path)
    assert tiny.predict(run.workdir, tmp_path / "in.jsonl", tmp_path / "mine.jsonl") == 2
    assert "mine.jsonl exists already; nothing was changed" in capsys.readouterr().err
    assert tiny.predict(run.workdir, tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--keep=id") == 2
    assert "belongs to other predictions:\n  keep: saved 'all', now 'id'\n" in capsys.readouterr().err
    (tmp_path / "in.jsonl").write_bytes(tiny.lines(GOOD[:3]))
    assert tiny.predict(run.workdir, tmp_path / "in.jsonl", tmp_path / "out.jsonl") == 2
    assert "input_digest: saved" in capsys.readouterr().err
    assert files(tmp_path) == before | {"in.jsonl": files(tmp_path)["in.jsonl"]}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--what=label"], "--what=label: did you mean 'labels'?"),
        (["--what=spans"], "it has no task head of spans; possible: answers, embeddings, labels, scores"),
        (["--what=proposals"], "it is a causal model; possible: "),
        (["--top_k=3"], "--top_k: --what=labels does not use it; valid: probabilities"),
        (["--text=bodi"], "no column 'bodi', which source 'task' of the stage names; set --text or --pair: did you"),
        (["--text={body}: {titel}"], "no column 'titel'"),
        (["--prompt=body"], "--what=labels: --prompt: expected --text and --pair"),
        (["--source=tusk"], "--source=tusk: did you mean 'task'?"),
        (["--keep=idd"], "has no column 'idd': did you mean 'id'"),
        (["--out=x.txt"], "--out=x.txt: "),
        (["--batch_size=0"], "--batch_size=0: expected at least 1"),
        (["--batch_size=3"], "--batch_size=3: expected a multiple of 8"),
        (["--in=inn.jsonl"], "no such file"),
        (["--step=6"], "6"),
        (["--what=answers", "--max_tokens=15"], "answers --max_tokens=15 needs at least 17"),
        (["--what=answers", "--max_tokens=0"], "--max_tokens=0: expected at least 1"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_nearest_right_thing(run, tmp_path, capsys, flags, message):
    (tmp_path / "in.jsonl").write_bytes(tiny.lines(GOOD))
    before = files(tmp_path)
    assert tiny.predict(run.workdir, tmp_path / "in.jsonl", tmp_path / "out.jsonl", *flags) == 2
    assert message in capsys.readouterr().err
    assert files(tmp_path) == before


def test_rows_are_read_as_the_source_of_the_stage_reads_them(tmp_path, monkeypatch):
    """Templates, pairs and transforms."""
    (tmp_path / "hook_of_predict.py").write_text("def shout(row):\n    return row | {'loud': row['body'].upper()}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    hooked = SourceConfig(
        "json", data_files="x", text="{loud}!", pair="other", label="kind", transforms=["hook_of_predict:shout"]
    )
    run = tiny.write(tmp_path / "run", "labels", sources={"task": hooked})
    [row] = tiny.predicted(run, [{"body": "fox", "other": "a"}], "--probabilities")
    logits = tiny.head("labels", tiny.hidden("labels", tiny.document("FOX!", "a")))[-1]
    expected = dict(zip(tiny.LABELS, tiny.softmax(logits).tolist(), strict=True))
    assert row["probabilities"] == pytest.approx(expected, rel=2e-4, abs=2e-5)
    assert list(row)[:2] == ["body", "other"]


def test_the_default_is_the_kind_that_the_stage_was_trained_for(tmp_path, monkeypatch):
    monkeypatch.setattr("llm3.cli.predict.open_session", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    rows = [{"body": "a", "text": "a", "context": "a", "question": "b", "turns": [{"role": "user", "content": "a"}]}]
    for kind in tiny.SOURCES:
        run = tiny.write(tmp_path / kind / "run", kind)
        (tmp_path / kind / "in.jsonl").write_bytes(tiny.lines(rows))
        out = tmp_path / kind / "out.jsonl"
        assert tiny.predict(run, tmp_path / kind / "in.jsonl", out, "--sequence_length=66") == 130
        assert json.loads((tmp_path / kind / "out.jsonl.provenance.json").read_text())["what"] == kind


@pytest.mark.slow
def test_several_processes_write_what_one_writes(run, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(tiny.lines(GOOD * 20))
    command = ["predict", f"--workdir={run.workdir}", "--stage=adapt", f"--in={tmp_path / 'in.jsonl'}"]
    for processes, devices in ((1, 4), (2, 2)):
        out = tmp_path / f"{processes}.csv"
        for ended in tiny_cluster.run(*command, f"--out={out}", processes=processes, devices=devices):
            assert ended.status == 0, ended.stderr
    assert (tmp_path / "1.csv").read_bytes() == (tmp_path / "2.csv").read_bytes()

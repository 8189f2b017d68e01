"""From the command line: an array job equals one process, bad rows stop a run, truncated documents are counted."""

import json
import re

import pytest

from llm3.__main__ import main
from llm3.config.load import load
from llm3.data.sources import lines
from llm3.stages.experiment import prepare
from tests.helpers import tiny_run
from tests.helpers.tiny_records import files


@pytest.fixture
def base(tmp_path):
    tiny_run.write_texts(tmp_path / "texts")
    return tmp_path


def call(base, verb, *arguments, extra=""):
    config = tiny_run.write_config(base / "config.py", base, extra)
    return main([verb, f"--config={config}", f"--workdir={base / 'run'}", *arguments])


def test_the_tasks_of_an_array_job_write_the_same_bytes_as_one_process(base, monkeypatch, capsys):
    monkeypatch.setattr(lines, "PART_BYTES", 4000)
    monkeypatch.setattr(lines, "SMALLEST_PART_BYTES", 4000)
    for task in (3, 1, 2):
        assert call(base, "data", f"--shard={task}/3", f"--config.cache_dir={base / 'tasks'}") == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("general: ")]
    assert [("complete" in line) for line in printed] == [False, False, True]
    assert call(base, "data", "--shard=1/1", f"--config.cache_dir={base / 'one'}") == 0
    tasks, one = (
        {name: content for name, content in files(base / each).items() if name.startswith("token")}
        for each in ("tasks", "one")
    )
    assert sum(name.endswith("/stream.bin") for name in tasks) > 12
    assert tasks == one


def test_a_run_with_too_many_bad_rows_ends_before_it_trains_and_says_where_they_are(base, capsys):
    broken = base / "texts" / "domain-train.jsonl"
    rows = broken.read_text(encoding="utf-8").splitlines()
    rows[3:3] = ['{"text": null}', "{{", '{"texts": "x"}']
    broken.write_text("\n".join(rows), encoding="utf-8")
    assert call(base, "run", "--stages=pretrain,posttrain") == 2
    error = capsys.readouterr().err
    assert "3 of" in error and all(
        f"{reason}: 1" in error for reason in ("text is null", "not JSON", "no field 'text'")
    )
    [file] = re.findall(r"they are in (\S+bad_rows\.jsonl)", error)
    with open(file, encoding="ascii") as bad:
        assert [json.loads(line)["row"] for line in bad] == [3, 4, 5]
    assert not list((base / "run").glob("*/metrics.jsonl"))
    assert call(base, "data", "--stages=posttrain", "--config.sources.domain.bad_rows=0.5") == 0
    assert "domain: 1 row set aside: not JSON" in capsys.readouterr().out


def test_truncated_padded_and_dropped_documents_have_columns(base, capsys):
    pairs = [{"q": "why " * n, "a": "so"} for n in (1, 1, 2, 40, 50)]  # the last two lose their answers
    pairs += [{"q": "how", "a": "thus " * 60}]  # truncated
    (base / "texts" / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    extra = f"""
c.sources.pairs = dict(path="json", data_files=dict(train="{base}/texts/pairs.jsonl"), prompt="q", answer="a")
c.stages.posttrain.data = dict(pairs=1.0)
with c.ignore_type():
    c.stages.posttrain.objective = "instruct"
""".strip()
    assert call(base, "data", "--stages=posttrain", extra=extra) == 0
    output = capsys.readouterr().out
    assert "warning: 33 % of the documents of pairs have no target that fits" in output
    shown = re.search(
        r"^ pairs +(?P<documents>\d+) +\S+ +(?P<bytes>[\d.]+) +(?P<windows>\d+) +(?P<padding>[\d.]+) % +(?P<cut>\d+)"
        r" +(?P<dropped>\d+) +100.0 % ",
        output,
        re.MULTILINE,
    )
    assert (shown["documents"], shown["cut"], shown["dropped"]) == ("6", "3", "2")
    assert 0 < float(shown["padding"]) < 100 and int(shown["windows"]) >= 2


def prepared(base, **fields):
    overrides = [f"stages.posttrain.{field}={value}" for field, value in fields.items()]
    overrides.append("stages.posttrain.data={'general': 1.0, 'task': 1.0}")
    config = load(str(tiny_run.write_config(base / "config.py", base)), overrides)
    return prepare(config, base / "run", ["pretrain", "posttrain"])


def test_temperature_and_the_unit_of_weights_reach_the_batches(base):
    data = prepared(base).stages["posttrain"].data
    tables, caches = data.tables, data.caches
    larger = caches["general"].tokens / caches["task"].tokens
    assert larger > 1.5
    ratios = {}
    for fields in ({"weights": "tokens"}, {"weights": "documents"}, {"temperature": 1.0}, {"temperature": 2.0}):
        drawn = prepared(base, **fields).stages["posttrain"].data.mixture.draws(1000)
        ratios[str(next(iter(fields.values())))] = drawn["general"] / drawn["task"]
    windows_a_document = {name: len(tables[name]) / caches[name].documents for name in tables}
    by_documents = windows_a_document["general"] / windows_a_document["task"]
    expected = {"tokens": 1, "documents": by_documents, "1.0": larger, "2.0": larger**0.5}
    assert ratios == pytest.approx(expected, rel=0.02)

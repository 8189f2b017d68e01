"""The verbs `data` and `overlap` show the documents of a run as the model sees them, and reject invalid ones."""

import json
import re

import pytest

from llm3.__main__ import main
from llm3.cli.data import class_lines
from tests.helpers import tiny_run

PAIRS = [("Which colour has the sky?", "blue"), ("Which colour has grass?", "green"), ("And what of snow?", "white")]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    base = tmp_path_factory.mktemp("texts")
    tiny_run.write_texts(base / "texts")
    lines = [json.dumps({"q": question, "a": answer}) for question, answer in PAIRS * 20]
    (base / "texts" / "pairs.jsonl").write_text("\n".join([*lines, '{"q": "null", "a": null}']))
    return base


def config(base, extra=""):
    return tiny_run.write_config(base / "config.py", base, extra)


INSTRUCT = """
c.sources.pairs = dict(path="json", data_files=dict(train="@texts/pairs.jsonl"), prompt="{q}\\n", answer="a")
c.sources.pairs.bad_rows = 0.1
c.stages.posttrain.data = dict(pairs=0.5)
c.stages.posttrain.replay = 0.2
c.stages.posttrain.data_schedule = [[5, dict(domain=1.0)]]
with c.ignore_type():
    c.stages.posttrain.objective = "instruct"
"""


def shown(capsys, base, *arguments, extra=""):
    file = config(base, extra.replace("@", f"{base}/").strip())
    status = main([*arguments, f"--config={file}", f"--workdir={base / 'run'}"])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return captured.out


def test_each_stage_is_shown_with_its_mixed_and_packed_sources(capsys, base):
    out = shown(capsys, base, "data", "--stages=pretrain,posttrain")
    posttrain = out[out.index("posttrain: causal, 8 x 32 tokens per step, 10 steps") :]
    (domain,) = re.findall(r"^ domain +(\d+) .* ([\d.]+) +(\d+) +[\d.]+ % +0 +0 +90\.0 % ", posttrain, re.MULTILINE)
    lines = (base / "texts" / "domain-train.jsonl").read_text().splitlines()
    assert int(domain[0]) == len(lines) and 1 < float(domain[1]) < 6 and int(domain[2]) > 1
    assert out.count("\n  | ") == 2 * 10


def test_classes_are_counted_and_those_that_look_alike_are_suspicious(capsys, base):
    out = shown(capsys, base, "data", "--stages=finetune")
    assert re.search(r"^  \w+: 2 classes: '\w+' \d+, '\w+' \d+$", out, re.MULTILINE) and "suspicious" not in out
    lines = class_lines({"pos": 1200, " pos": 3, "neg": 2, "Neg": 1, "none": 1})
    assert list(lines) == [
        "5 classes: 'pos' 1,200, ' pos' 3, 'neg' 2, 'Neg' 1, 'none' 1",
        "suspicious classes: 'pos', ' pos' differ in white space, letter case or Unicode form only",
        "suspicious classes: 'neg', 'Neg' differ in white space, letter case or Unicode form only",
    ]


def test_targets_are_marked(capsys, base):
    out = shown(capsys, base, "data", "--stages=finetune")
    rows = [line for line in out.splitlines() if line.startswith("  | ")]
    assert rows and all(re.search(r"«(general|domain)»", row) for row in rows)


def test_exactly_the_answers_and_their_ends_are_marked_and_bad_rows_are_counted(capsys, base):
    out = shown(capsys, base, "data", "--stages=posttrain", extra=INSTRUCT)
    assert "from step 5: domain 80.0 %, general 20.0 %" in out
    assert "pairs: 1 row set aside: a is null" in out
    rows = "".join(line for line in out.splitlines() if line.startswith("  | ") and "colour" in line)
    assert "<|bos|>Which colour has the sky?⏎«blue<|eos|>»" in rows


def test_after_a_long_prompt_the_answer_is_shown_all_the_same(capsys, base):
    long = INSTRUCT.replace("{q}", "{q}" + " so" * 200) + "c.stages.posttrain.sequence_length = 512\n"
    out = shown(capsys, base, "data", "--stages=posttrain", extra=long)
    row = next(line for line in out.splitlines() if line.startswith("  | ") and "colour has the sky" in line)
    assert " ... " in row and "so⏎«" in row and len(row) < 400


def test_the_overlap_of_each_evaluation_with_the_training_data_is_printed(capsys, base):
    (base / "texts" / "domain-validation.jsonl").write_text((base / "texts" / "domain-train.jsonl").read_text())
    out = shown(capsys, base, "overlap")
    assert re.search(r"^ domain +4 +4 +4 +4 *$", out, re.MULTILINE)
    assert re.search(r"domain: highest overlap in rows \d+ \(100\.0 %\)", out)


def test_a_shard_is_tokenized_alone(capsys, base, tmp_path):
    out = shown(capsys, base, "data", "--shard=1/1", f"--config.cache_dir={tmp_path / 'cache'}")
    assert re.search(r"^general: shard 1/1 is built; complete, [\d,]+ tokens$", out, re.MULTILINE)


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", "1/0"])
def test_a_shard_that_there_is_not_is_refused(capsys, base, shard):
    assert main(["data", f"--config={config(base)}", f"--workdir={base / 'run'}", f"--shard={shard}"]) == 2
    assert f"--shard={shard}: expected I/N" in capsys.readouterr().err


def test_a_source_of_another_form_than_the_objective_takes_is_refused(capsys, base):
    extra = INSTRUCT.replace('"instruct"', '"causal"').replace("@", f"{base}/").strip()
    assert main(["data", f"--config={config(base, extra)}", f"--workdir={base / 'run'}"]) == 2
    assert "takes text rows, but source 'pairs' has dialogue rows" in capsys.readouterr().err

"""`eval --tasks`: tasks of lm-eval on the checkpoints of a run; and what its flags and a config's harness refuse."""

import json
import re

import numpy as np
import pytest

from llm3.__main__ import main
from llm3.cli.checks import check
from llm3.config.load import load
from llm3.errors import UserError
from llm3.report.material import Material
from llm3.report.matrix import complete, metrics_of, standard_error
from llm3.report.page import page
from llm3.report.predictions import read_predictions
from llm3.report.table import markdown
from llm3.stages import rules
from tests.helpers import tiny_cluster
from tests.helpers import tiny_run as tiny
from tests.helpers.tiny_tasks import CHOICES, write_tasks

SUITE = 'c.evaluations["suite"] = dict(kind="harness", options=dict(tasks=["picks", "reads"], include_path="@tasks"))'


def config_with(tmp_path, extra: str, *overrides: str):
    file = tiny.write_config(tmp_path / "config.py", tmp_path, extra.replace("@", f"{tmp_path}/"))
    return load(str(file), list(overrides))


@pytest.fixture
def run(tmp_path):
    """A run of one stage with random parameters, and tasks beside it."""
    tiny_export = pytest.importorskip("tests.helpers.tiny_export")
    tiny_export.write_run(tmp_path / "run", *tiny_export.model())
    (tmp_path / "tasks").mkdir()
    write_tasks(tmp_path / "tasks")
    return tmp_path / "run"


def command(run, tasks: str, *flags: str) -> list[str]:
    include = f"--include_path={run.parent / 'tasks'}"
    return ["eval", f"--workdir={run}", "--stages=adapt", f"--tasks={tasks}", include, *flags]


def test_tasks_are_measured_on_a_checkpoint_without_its_config(run, capsys):
    pytest.importorskip("lm_eval")
    before = tiny.files(run)
    assert main(command(run, "picks,reads", "--sequence_length=48", "--limit=4")) == 0
    said = capsys.readouterr()
    assert "adapt: evaluating step 7, in windows of 48 tokens" in said.out and not said.err
    row = next(line for line in said.out.splitlines() if line.startswith("adapt "))
    assert (
        re.search(r"adapt +\d+\.\d ± \d+\.\d %|adapt +[\d.]+", row) and "picks" in said.out and "bits/byte" in said.out
    )
    assert "± is one standard error over the documents" in said.out
    assert tiny.files(run) == before


def test_rows_of_tasks_are_printed_as_json_and_written_with_a_file_of_predictions_for_each_task(run, capsys):
    pytest.importorskip("lm_eval")
    out = run.parent / "out"
    assert main(command(run, "picks,reads", "--sequence_length=48", "--limit=2", "--json", f"--out={out}")) == 0
    said = capsys.readouterr()
    (row,) = map(json.loads, said.out.splitlines())
    assert row["stage"] == "adapt" and row["step"] == 7 and row["details"]["settings"]["sequence_length"] == 48
    assert "evaluating step 7" in said.err
    assert json.loads((out / "adapt" / "evaluation.json").read_text()).items() <= row.items()
    assert read_predictions(out / "adapt", "picks")["score"].mean() == row["picks_acc"]
    assert len(read_predictions(out / "adapt", "reads")["item"]) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--limit=-1"], "--limit=-1.0: expected at least 0"),
        (["--num_fewshot=-2"], "--num_fewshot=-2: expected at least 0"),
        (["--batch_size=0"], "--batch_size=0: expected at least 1"),
        (["--batch_size=3"], "--batch_size=3: expected a multiple of 8"),
        (["--apply_chat_template"], "--apply_chat_template: the model has no chat template"),
        (["--stages=adap"], "holds no stage 'adap'; did you mean 'adapt'"),
    ],
)
def test_flags_that_cannot_be_followed_are_refused_by_name(run, capsys, flags, message):
    pytest.importorskip("lm_eval")
    assert main(command(run, "picks", *flags)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--limit=3"], "--limit=3.0: expected --tasks=NAME as well"),
        (["--include_path=x"], "--include_path=x: expected --tasks=NAME as well"),
        ([], "eval: expected --config=FILE, or --tasks=NAME"),
    ],
)
def test_flags_of_tasks_need_tasks(tmp_path, capsys, flags, message):
    assert main(["eval", f"--workdir={tmp_path}", *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_library_is_named_with_its_extra_before_anything_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    options = {"config": config_with(tmp_path, SUITE), "workdir": tmp_path, "stages": None}
    with pytest.raises(
        UserError, match=r"^config.evaluations.suite.kind='harness': needs lm_eval.*install 'llm3\[eval\]'"
    ):
        check("run", options)
    check("plan", options | {"topology": "", "aot": False, "price": None})  # which does not need it
    with pytest.raises(UserError, match=r"^--tasks=a,b: needs lm_eval"):
        check("eval", options | {"config": None, "tasks": ["a", "b"]})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("source=general", r"suite.source='general': an evaluation of kind 'harness' has no source"),
        ("split=test", r"suite.split='test': an evaluation of kind 'harness' has no source"),
        ("max_documents=3", r"suite.max_documents=3: an evaluation of kind 'harness' has no source"),
        ("options.task=['x']", r"suite.options.task: no such option; did you mean 'tasks'"),
        ("kind=perplexity", r"suite.source='': valid: domain, general, task"),
    ],
)
def test_an_evaluation_has_a_source_if_and_only_if_its_kind_reads_one(tmp_path, override, message):
    assert rules.check(config_with(tmp_path, SUITE))
    with pytest.raises(UserError, match=message):
        rules.check(config_with(tmp_path, SUITE, f"evaluations.suite.{override}"))


ROW = {
    "stage": "a", "suite_picks_acc": 0.25, "suite_picks_acc_stderr": 0.05, "suite_picks_items": 80,
    "suite_cola_mcc": 0.5, "suite_cola_mcc_stderr": 0.125, "suite_cola_items": 9,
    "suite_reads_bits_per_byte": 1.5, "suite_reads_bits_per_byte_stderr": None,
    "suite_reads_byte_perplexity": 2.8, "suite_reads_byte_perplexity_stderr": None,
    "task_accuracy": 0.5, "task_items": 100,
}  # fmt: skip


def test_standard_errors_stand_beside_their_metric_in_the_table_and_in_the_page():
    (row,), _ = complete([ROW], [])
    metrics = {metric.key: metric for metric in metrics_of([row])}
    assert set(metrics) == {"suite_picks_acc", "suite_cola_mcc", "suite_reads_bits_per_byte", "task_accuracy"}
    table = markdown([ROW], [])
    assert "| 25.0 ± 5.0 % |" in table and "| 0.500 ± 0.125 |" in table and "| 1.500 |" in table
    errors = {key: standard_error(row, metrics[key]) for key in ("suite_picks_acc", "task_accuracy")}
    assert errors == {"suite_picks_acc": 0.05, "task_accuracy": pytest.approx(0.05)}
    text = page(Material([ROW]))
    assert "± is one standard error" in text


@pytest.mark.slow
def test_two_processes_write_the_row_that_one_writes_and_choose_the_best_checkpoint_by_it(tmp_path):
    pytest.importorskip("lm_eval")
    tiny.write_texts(tmp_path / "texts")
    (tmp_path / "tasks").mkdir()
    write_tasks(tmp_path / "tasks")
    best = 'c.stages["pretrain"]["best"] = "suite_picks_acc_norm"'
    file = tiny.write_config(tmp_path / "config.py", tmp_path, f"{SUITE.replace('@', f'{tmp_path}/')}\n{best}")
    common = ["run", f"--config={file}", "--stages=pretrain"]
    tiny.process([*common, f"--workdir={tmp_path / 'one'}"])
    for each in tiny_cluster.run(
        *common, f"--workdir={tmp_path / 'two'}", "--config.cache_dir=" + str(tmp_path / "c2")
    ):
        assert each.status == 0, each.stderr
        assert "fatal" not in each.stderr and "it/s" not in each.stderr
    one, two = (json.loads((tmp_path / name / "matrix.json").read_text())["rows"] for name in ("one", "two"))
    assert [row["stage"] for row in one] == ["init", "pretrain"]
    for a, b in zip(one, two, strict=True):
        suite = {key: value for key, value in a.items() if key.startswith("suite_") and value is not None}
        assert len(suite) >= 6 and {key: b[key] for key in suite} == pytest.approx(suite, rel=1e-3)
        assert a["suite_picks_items"] == len(CHOICES)
    details = json.loads((tmp_path / "one" / "pretrain" / "details.json").read_text())
    assert [each["metric"] for each in details["suite_tasks"]][:2] == ["acc", "acc_norm"]
    report = (tmp_path / "one" / "report.md").read_text()
    assert "suite tasks" in report and np.isfinite(one[1]["suite_reads_bits_per_byte"])

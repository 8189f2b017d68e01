"""Whole runs: what they leave, and that no kind of death changes what they compute."""

import csv
import hashlib
import json
import math
import pathlib
import re
import shutil
import time
import types

import jax
import jax.numpy as jnp
import pytest

from llm3.__main__ import main
from llm3.checkpoints.load import load_stage
from llm3.checkpoints.stage_checkpoints import Checkpoints
from llm3.cli.run import is_reported
from llm3.data.prompts import read_prompt
from llm3.data.tokenizer import Tokenizer
from llm3.models.batching import sample
from llm3.report.matrix import KEYS
from llm3.report.predictions import read_predictions
from llm3.stages.samples import read_samples
from llm3.tree import params_digest
from tests.helpers import forks
from tests.helpers import tiny_run as tiny
from tests.helpers.tiny_damage import edited
from tests.helpers.tiny_events import scalars

PROMPTS = ["The president", "A"]
SAMPLES = (f"--config.samples={PROMPTS}", "--config.sample_tokens=4", "--config.stages.pretrain.sample_every=4")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    tiny.write_texts(directory / "texts")
    return directory


@pytest.fixture(scope="module")
def whole(base):
    """An uninterrupted run of all stages."""
    config, workdir = tiny.write_config(base / "config.py", base), base / "whole"
    command = ("run", f"--config={config}", f"--workdir={workdir}", *SAMPLES)
    output = tiny.process(command, plots=True).stdout
    return types.SimpleNamespace(base=base, config=config, workdir=workdir, command=command, output=output)


def newest(workdir, stage) -> Checkpoints:
    return Checkpoints(workdir / stage / "checkpoints", read_only=True)


def assert_same_results(workdir, whole):
    """The same parameters after every stage, and each step logged once."""
    assert tiny.digests(workdir) == tiny.digests(whole.workdir)
    for stage in tiny.STAGES:
        lines, expected = tiny.metrics(workdir / stage), tiny.metrics(whole.workdir / stage)
        assert len({line["step"] for line in lines}) == len(lines)
        losses = {line["step"]: line["loss"] for line in lines}
        assert all(losses[line["step"]] == line["loss"] for line in expected[-1:])
        assert lines[-1]["tokens"] == expected[-1]["tokens"]


def test_a_run_leaves_a_matrix_with_every_key_and_null_where_nothing_applies(whole):
    matrix = json.loads((whole.workdir / "matrix.json").read_text())
    assert [row["stage"] for row in matrix["rows"]] == ["init", "pretrain", "posttrain", "finetune"]
    assert [row["stage"] for row in matrix["baselines"]] == ["scratch"]
    rows = tiny.rows(whole.workdir)
    for row in rows.values():
        assert set(KEYS) <= set(row)
    for stage in ("init", "pretrain", "posttrain"):
        assert [rows[stage][key] for key in ("task_accuracy", "task_macro_f1", "majority_accuracy")] == [None] * 3
    assert rows["init"]["peak_bytes"] is None
    for stage in tiny.STAGES:
        applies = [key for key in KEYS if not key.startswith("task_") and key != "majority_accuracy"]
        assert None not in [rows[stage][key] for key in applies]
    for stage in ("finetune", "scratch"):
        assert 0 <= rows[stage]["task_accuracy"] <= 1 and 0.5 <= rows[stage]["majority_accuracy"] <= 1
    assert rows["pretrain"]["tokens"] <= 10 * 8 * 32 and rows["pretrain"]["flops"] > 0


def test_a_run_trains(whole):
    rows = tiny.rows(whole.workdir)
    assert rows["pretrain"]["general_bits_per_byte"] < rows["init"]["general_bits_per_byte"]
    assert rows["posttrain"]["domain_bits_per_byte"] < rows["pretrain"]["domain_bits_per_byte"]


def test_a_run_leaves_a_report_with_plots(whole):
    report = (whole.workdir / "report.md").read_text()
    assert all(stage in report for stage in tiny.STAGES)
    page = (whole.workdir / "report.html").read_text()
    for plot in ("matrix", "progress", "lineage"):
        assert (whole.workdir / "figures" / f"{plot}.svg").read_text().startswith("<svg")
        assert f"(figures/{plot}.svg)" in report
    assert page.count("<svg") == report.count("](figures/") and len(page.encode()) < 10**6


def test_prompts_are_continued_by_every_model_and_between_steps(whole):
    steps = {"init": [0], "pretrain": [4, 8, 10], "posttrain": [10], "finetune": [10], "scratch": [10]}
    for stage, expected in steps.items():
        lines = read_samples(whole.workdir / stage)
        assert [line["step"] for line in lines] == [step for step in expected for _ in range(2)]
        assert [line["prompt"] for line in lines] == PROMPTS * len(expected)
        assert f"{stage}: step {expected[-1]}: A | " in whole.output
    params, model, _ = load_stage(whole.workdir, "pretrain")
    tokenizer = Tokenizer.load(whole.workdir / "tokenizer.json")
    for line in read_samples(whole.workdir / "pretrain")[-2:]:
        prompt = read_prompt(line["prompt"], "", tokenizer)
        made = sample(jax.tree.map(jnp.asarray, params), model, prompt.tokens, max_tokens=4, temperature=0)
        assert line["text"] == tokenizer.decode(made), "on one device, one prompt at a time"
    events = b"".join(path.read_bytes() for path in (whole.workdir / "pretrain").glob("events.*"))
    assert events.count(b"**The president**") == 3, "TensorBoard shows them too"


def assert_tensorboard_has_the_rows(workdir, *more):
    rows = tiny.rows(workdir)
    for stage in tiny.STAGES:
        shown = {tag.removeprefix("final/"): value for _, tag, value in scalars(workdir / stage) if "final/" in tag}
        measured = ["general_bits_per_byte", "domain_bits_per_byte", "tokens", *more]
        measured += ["task_accuracy"] * (rows[stage]["task_accuracy"] is not None)
        for key in measured:
            assert shown[key] == pytest.approx(rows[stage][key], rel=1e-6)


def test_tensorboard_has_the_row_of_every_stage_also_after_a_later_evaluation(whole, later):
    assert_tensorboard_has_the_rows(whole.workdir)
    assert_tensorboard_has_the_rows(later.workdir, "extra_bits_per_byte")


def test_a_row_is_of_the_parameters_in_the_last_checkpoint(whole):
    for stage, digest in tiny.digests(whole.workdir).items():
        if stage != "init":
            checkpoints = newest(whole.workdir, stage)
            assert checkpoints.latest() == 10
            assert params_digest(checkpoints.load_params(10)) == digest == checkpoints.meta(10)["params_digest"]


def test_a_checkpoint_tells_its_lineage_back_to_the_first_stage(whole):
    digests = tiny.digests(whole.workdir)
    meta = newest(whole.workdir, "finetune").meta(10)
    assert [each["stage"] for each in meta["lineage"]] in (["pretrain", "posttrain"], ["posttrain", "pretrain"])
    for each in meta["lineage"]:
        assert each["params_digest"] == digests[each["stage"]] and each["step"] == 10
    assert meta["parent"]["stage"] == "posttrain" and meta["fresh"] == ["head/bias", "head/kernel"]
    assert newest(whole.workdir, "scratch").meta(10)["parent"] is None


@pytest.fixture(scope="module")
def answers(whole):
    """What the verbs say of the finished run, and whether they leave it as it was."""
    copy = shutil.copytree(whole.workdir, whole.base / "copied" / "whole")
    files = [copy / name for name in ("report.md", "report.html", "matrix.json")]
    written = {path.name: path.read_bytes() for path in files}
    for path in [*files, *(copy / "figures").iterdir()]:
        path.unlink()
    common, prompt = whole.command[1:3], ("--prompt=The president", "--max_tokens=4", "--seed=1")
    before = tiny.files(whole.workdir)
    task, general = (whole.base / "texts" / f"{name}.jsonl" for name in ("task-test", "general-validation"))
    done = tiny.process(
        whole.command,
        ("eval", *common),
        ("eval", *common, "--json", f"--out={whole.base / 'out'}"),
        ("generate", common[1], *prompt),
        ("generate", *common, *prompt, "--stage=pretrain"),
        ("bench", common[0], f"--workdir={whole.base / 'bench'}", "--stage=pretrain", "--json"),
        ("plan", common[0], "--stages=finetune", "--config.stages.finetune.train=top(1)"),
        ("lineage", common[1]),
        ("report", copy),
        ("compare", whole.workdir, copy),
        ("report", whole.workdir, copy, f"--out={whole.base / 'compared'}"),
        ("predict", common[1], "--stage=finetune", f"--in={task}", f"--out={whole.base / 'labels.jsonl'}"),
        ("predict", common[1], "--stage=pretrain", f"--in={general}", f"--out={whole.base / 'scores.csv'}"),
    )
    names = (
        *("again", "eval", "eval_json", "generate", "generate_stage", "bench", "plan", "lineage"),
        *("report", "compare", "report_both", "labels", "scores"),
    )
    outputs = dict(zip(names, done.stdout.split(tiny.NEXT), strict=False))
    return types.SimpleNamespace(**outputs, copy=copy, written=written, unchanged=tiny.files(whole.workdir) == before)


def test_the_same_command_again_says_so_and_does_nothing(answers):
    assert "Nothing left to do" in answers.again and "report.html" in answers.again
    assert "evaluating" not in answers.again


def test_no_verb_changes_a_file_of_a_finished_run(answers):
    assert answers.unchanged


def test_a_run_without_a_whole_report_has_something_left_to_do(tmp_path, whole):
    names = ["init", *tiny.STAGES]
    for name in ("matrix.json", "report.html"):
        assert not is_reported(tmp_path, names)
        (tmp_path / name).write_bytes((whole.workdir / name).read_bytes())
    assert is_reported(tmp_path, names) and not is_reported(tmp_path, [*names, "another"])


def test_the_metrics_of_a_row_can_be_computed_from_its_predictions(whole):
    for stage, row in tiny.rows(whole.workdir).items():
        for name in ("general", "domain"):
            columns = read_predictions(whole.workdir / stage, name)
            assert len(columns["item"]) == 4 and list(columns["item"]) == sorted(set(columns["item"]))
            found = columns["nats"].sum() / (math.log(2) * columns["bytes"].sum())
            assert found == pytest.approx(row[f"{name}_bits_per_byte"], rel=1e-12)
        columns = read_predictions(whole.workdir / stage, "task")
        assert (columns is None) == (row["task_accuracy"] is None)
        if columns is not None:
            means = columns["score"].mean(), columns["nats"].mean()
            assert means == pytest.approx((row["task_accuracy"], row["task_nll"]), rel=1e-12)
            assert set(columns["truth"]) == set(columns["classes"]) == {"general", "domain"}


def test_eval_prints_and_writes_the_rows_where_asked(whole, answers):
    out = whole.base / "out"
    lines = [json.loads(line) for line in answers.eval_json.splitlines() if line]
    printed = {row["stage"]: row for row in lines}
    assert list(printed) == list(tiny.STAGES)
    for stage, row in printed.items():
        saved = json.loads((whole.workdir / stage / "evaluation.json").read_text())
        assert json.loads((out / stage / "evaluation.json").read_text()).items() <= row.items()
        same = ("general_bits_per_byte", "domain_bits_per_byte", "task_accuracy", "params_digest", "evaluations")
        assert [row.get(key) for key in same] == [saved.get(key) for key in same] and row["step"] == 10
        assert bool(row["details"]) == (stage in ("finetune", "scratch"))
        for file in (whole.workdir / stage / "predictions").iterdir():
            assert (out / stage / "predictions" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("out", ["{run}", "{run}/pretrain/new", "{base}", "{config}"])
def test_eval_writes_neither_into_the_run_nor_into_a_folder_with_files(whole, capsys, out):
    before = tiny.files(whole.workdir)
    flag = "--out=" + out.format(run=whole.workdir, base=whole.base, config=whole.config)
    assert main(["eval", *whole.command[1:], flag]) == 2
    assert "--out=" in capsys.readouterr().err and tiny.files(whole.workdir) == before


@pytest.fixture(scope="module")
def later(whole):
    """The finished run with other evaluations: one is new, one has changed, one is gone; and then with other data."""
    base, workdir = whole.base / "later", whole.base / "later" / "run"
    shutil.copytree(whole.workdir, workdir)
    shutil.copytree(whole.base / "texts", base / "texts")
    changed = """c.evaluations.domain.max_documents = 5
c.evaluations.extra = dict(c.evaluations.general.to_dict(), split="test")
del c.evaluations.task
c.cache_dir = c.cache_dir.replace("/later/", "/")
for source in c.sources.values():
    source.data_files = {split: file.replace("/later/", "/") for split, file in source.data_files.items()}
"""
    config = tiny.write_config(base / "config.py", base, changed)
    command = ("run", f"--config={config}", f"--workdir={workdir}")
    before = tiny.files(workdir)
    first, again, _ = tiny.process(command, command).stdout.split(tiny.NEXT)
    return types.SimpleNamespace(workdir=workdir, before=before, after=tiny.files(workdir), first=first, again=again)


def test_an_evaluation_that_is_added_later_is_run_for_finished_stages_without_touching_them(whole, later):
    training = [
        name for name in later.before if "/checkpoints/" in name or name.endswith(("metrics.jsonl", "config.json"))
    ]
    assert len(training) > 20
    for name in training:
        assert later.after[name] == later.before[name]
    rows, old = tiny.rows(later.workdir), tiny.rows(whole.workdir)
    for stage in ("init", *tiny.STAGES):
        assert f"{stage}: evaluating extra, which its row lacks" in later.first
        assert rows[stage]["extra_bits_per_byte"] > 0
        assert rows[stage]["general_bits_per_byte"] == old[stage]["general_bits_per_byte"]
        assert rows[stage]["params_digest"] == old[stage]["params_digest"]
        assert rows[stage]["tokens"] == old[stage]["tokens"] and rows[stage]["seconds"] == old[stage]["seconds"]
        assert read_predictions(later.workdir / stage, "extra") is not None
    assert "Nothing left to do" in later.again


def test_an_evaluation_that_has_changed_is_run_again_and_one_that_is_gone_is_kept_but_not_shown(whole, later):
    assert later.first.count("again, since it has changed: evaluation.max_documents: saved 4, now 5") == 5
    rows = tiny.rows(later.workdir)
    assert not any(key.startswith("task_") and value is not None for row in rows.values() for key, value in row.items())
    assert "per class" in (whole.workdir / "report.md").read_text()
    assert "per class" not in (later.workdir / "report.md").read_text()
    for stage in tiny.STAGES:
        row, old = (json.loads((run / stage / "evaluation.json").read_text()) for run in (later.workdir, whole.workdir))
        assert row.get("task_accuracy") == old.get("task_accuracy")
        assert len(read_predictions(later.workdir / stage, "domain")["item"]) == 5
        path = f"{stage}/predictions/task.parquet"
        assert later.after.get(path) == later.before.get(path)


def test_a_row_is_measured_again_if_its_data_has_changed(later, whole):
    from llm3.config.load import load
    from llm3.stages.later import is_current

    config, names = load(str(later.workdir.parent / "config.py")), ["init", *tiny.STAGES]
    assert is_current(config, later.workdir, names)
    row = later.workdir / "pretrain" / "evaluation.json"
    before = row.read_text()
    fingerprint = json.loads(before)["evaluations"]["extra"]["data"]
    row.write_text(before.replace(fingerprint, "0" * 64))
    try:
        assert not is_current(config, later.workdir, names)
    finally:
        row.write_text(before)


@pytest.fixture(scope="module")
def disturbed(whole):
    """One run that is killed, damaged, and stopped by both signals; what its last starts said.

    It is killed while texts are read, and before a row is measured; in the midst of training: see test_deaths.py.
    """
    config, workdir = tiny.write_config(whole.base / "disturbed.py", whole.base), whole.base / "disturbed"
    command = ("run", f"--config={config}", f"--workdir={workdir}", f"--config.cache_dir={whole.base / 'own-cache'}")
    command += SAMPLES

    def start(count, *deaths, point="", status=0):
        deaths = [f"SIGKILL@{each}" for each in deaths]
        stages = f"--stages={','.join(tiny.STAGES[:count])}"  # a start traces all stages that it is to train
        return tiny.process((*command, stages), deaths=deaths, point=point, status=status).stdout

    start(1, "tokenizer", "tokens", point="SIGKILL@saved:pretrain:8", status=-9)
    params = workdir / "pretrain" / "checkpoints" / "8" / "params"
    largest = max((path for path in params.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    interrupted = start(2, point="SIGINT@log:posttrain:6", status=130)
    latest = [newest(workdir, "posttrain").latest()]
    terminated = start(3, point="SIGTERM@log:finetune:4", status=75)
    latest.append(newest(workdir, "finetune").latest())
    done = start(4, "row:scratch")
    said = {"interrupted": interrupted, "terminated": terminated, "done": done}
    return types.SimpleNamespace(workdir=workdir, latest=latest, **said)


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_point_ends_bit_for_bit_as_if_it_had_not_been(whole, disturbed):
    assert "scratch: resumes at step 10" in disturbed.done
    assert_same_results(disturbed.workdir, whole)
    assert_tensorboard_has_the_rows(disturbed.workdir)
    for stage in ("init", *tiny.STAGES):
        assert read_samples(disturbed.workdir / stage) == read_samples(whole.workdir / stage)


@pytest.mark.slow
def test_a_run_that_is_damaged_and_stopped_says_so_and_ends_bit_for_bit_the_same(whole, disturbed):
    damaged = disturbed.interrupted
    assert "step 8 is damaged and was skipped" in damaged and "pretrain: resumes at step 4" in damaged
    # the status says that nothing was raised; Orbax may log what became of its other reads of the damaged step
    assert "Rerun the command to resume" in damaged
    assert "posttrain: resumes at step 7" in disturbed.terminated
    assert disturbed.latest == [7, 5], "a stop saves the step that it comes after"
    assert "finetune: resumes at step 5" in disturbed.done
    assert_same_results(disturbed.workdir, whole)


def check_two_runs_in_one_workdir(whole, workdir, start, capsys):
    """Train scratch while finetune is trained: neither disturbs the other. In the end, finetune is killed."""

    def command(name, extra, stage):
        config = tiny.write_config(whole.base / f"{name}.py", whole.base, extra)
        return ["run", f"--config={config}", f"--workdir={workdir}", f"--stages={stage}", start]

    one = command("one", "del c.stages.scratch", "finetune")
    other = command("other", "del c.stages.finetune", "scratch")
    third = command("third", 'c.stages.third = c.stages.finetune.to_dict() | {"start": "finetune"}', "third")
    running = forks.Fork(["SIGSTOP@saved:finetune:4", json.dumps([one])])
    while "(stopped)" not in (state := pathlib.Path(f"/proc/{running.pid}/status").read_text()):
        assert "(zombie)" not in state
        time.sleep(0.05)
    assert main(one) == main(third) == 2
    error = capsys.readouterr().err
    assert f"finetune is in use by process {running.pid} on " in error
    assert f"config.stages.third.start: {workdir}/finetune is trained by process {running.pid} on " in error
    tiny.process(other)
    running.kill()
    running.communicate(tiny.ENDS_WITHIN)
    assert "finetune: resumes at step 4" in tiny.process(one).stdout
    assert {"posttrain", "finetune", "scratch"} < tiny.rows(workdir).keys(), "though no config has the last two"
    sessions = json.loads((workdir / "sessions.json").read_text())
    assert [each["stages"] for each in sessions[-3:]] == [["finetune"], ["scratch"], ["finetune"]]


@pytest.mark.slow
def test_stages_one_by_one_or_two_at_once_and_from_another_run_equal_all_in_one(whole, capsys):
    """pretrain in one run; from its directory, posttrain in a second one; then what is left there, in two runs."""
    parent, child = whole.base / "parent", whole.base / "child"
    start = f"--config.stages.posttrain.start={{'run': '{parent}', 'stage': 'pretrain'}}"
    here, there = (("run", f"--config={whole.config}", f"--workdir={each}") for each in (parent, child))
    tiny.process((*here, "--stages=pretrain"), (*there, "--stages=posttrain", start))
    check_two_runs_in_one_workdir(whole, child, start, capsys)
    expected = tiny.digests(whole.workdir)
    assert tiny.digests(parent) == {stage: expected[stage] for stage in ("init", "pretrain")}
    own = {stage: digest for stage, digest in expected.items() if stage != "pretrain"}
    assert tiny.digests(child) == own | {"parent-pretrain": expected["pretrain"]}
    assert newest(child, "finetune").meta(10)["lineage"][0]["run"] == str(parent)
    # a parent outside of the run has a row, measured by the run's evaluations, and the cost that it had there
    rows, before = tiny.rows(child), tiny.rows(whole.workdir)
    assert rows["posttrain"]["parent"] == "parent-pretrain"
    metrics = ("general_bits_per_byte", "domain_bits_per_byte", "tokens", "flops")
    assert [rows["parent-pretrain"][key] for key in metrics] == [before["pretrain"][key] for key in metrics]
    change = "general_bits_per_byte_change"
    assert rows["posttrain"][change] == before["posttrain"][change] is not None
    assert rows["parent-pretrain"][change] is None
    # once it is measured the parent is needed no more, and its row stays as it is
    parent.rename(whole.base / "gone")
    again = (*there, "--stages=posttrain,finetune,scratch", start)
    same, fewer, _ = tiny.process(again, (*again, "--config.evaluations.general.max_documents=3")).stdout.split(
        tiny.NEXT
    )
    assert "Nothing left to do" in same
    assert "parent-pretrain: not evaluated by general, since it cannot be read" in fewer
    rows = tiny.rows(child)
    assert rows["posttrain"]["general_bits_per_byte"] is not None is rows["parent-pretrain"]["general_bits_per_byte"]
    assert rows["posttrain"]["domain_bits_per_byte_change"] is not None is rows["posttrain"][change]


def test_a_stage_whose_parent_was_trained_anew_is_refused(whole, capsys):
    row = whole.workdir / "pretrain" / "evaluation.json"
    before = row.read_text()
    row.write_text(before.replace(tiny.digests(whole.workdir)["pretrain"], "0" * 64))
    try:
        assert main([*whole.command]) == 2
    finally:
        row.write_text(before)
    error = capsys.readouterr().err
    assert "posttrain was trained from other parameters of 'pretrain'" in error and "000000000000 now" in error


@pytest.mark.slow
def test_a_row_that_is_measured_again_has_the_digest_that_the_checkpoint_has_in_an_older_format(whole):
    workdir = shutil.copytree(whole.workdir, whole.base / "measured again")
    edited(lambda meta: meta.update(params_digest="0" * 64), valid_digest=True)(workdir / "scratch" / "checkpoints")
    (workdir / "scratch" / "evaluation.json").unlink()
    command = ("run", f"--config={whole.config}", f"--workdir={workdir}", "--stages=scratch")
    assert main([*command, "--config.evaluations={}"]) == 0
    assert tiny.digests(workdir)["scratch"] == "0" * 64


@pytest.mark.slow
def test_a_report_that_was_cut_short_is_written_again(whole):
    """matrix.json is written last: without it, the report is not taken for whole."""
    matrix = whole.workdir / "matrix.json"
    before = matrix.read_text()
    matrix.unlink()
    output = tiny.process(whole.command).stdout
    assert "Report:" in output and matrix.read_text() == before


def test_eval_prints_the_figures_of_the_rows(whole, answers):
    lines = {line.split()[0]: line for line in answers.eval.splitlines() if line.strip() and "evaluating" not in line}
    for stage in tiny.STAGES:
        row, line = tiny.rows(whole.workdir)[stage], lines[stage]
        assert f"{row['general_bits_per_byte']:.3f}" in line and f"{row['domain_bits_per_byte']:.3f}" in line
        if row["task_accuracy"] is not None:
            assert f"{100 * row['task_accuracy']:.1f} %" in line and f"{100 * row['task_macro_f1']:.1f} %" in line


def test_generate_continues_the_prompt_with_every_stage_that_was_trained_to_or_with_one(answers):
    heads = [line.split()[0] for line in answers.generate.splitlines() if "───" in line]
    assert heads == ["pretrain", "posttrain"]
    assert answers.generate.count("The president") == len(heads)
    assert answers.generate_stage.strip() in answers.generate and "───" not in answers.generate_stage


def test_bench_prints_one_line_of_json(whole, answers):
    figures = json.loads(answers.bench)
    assert figures["step_seconds_min"] <= figures["step_seconds"] <= figures["step_seconds_max"]
    keys = ("tokens_per_second", "flops_per_step", "compile_seconds", "temp_bytes", "params", "trainable_params")
    assert all(figures[key] > 0 for key in keys)
    row = tiny.rows(whole.workdir)["pretrain"]
    assert figures["params"] == row["params"] and 10 * figures["flops_per_step"] == row["flops"]


def test_bench_leaves_no_tokenizer_for_a_later_run_with_another_config(whole, answers):
    assert not (whole.base / "bench" / "tokenizer.json").exists()


def test_plan_shows_which_layers_of_a_leaf_train_and_what_the_step_costs_beside_full_training(answers):
    lines = {line.split()[0]: line.split() for line in answers.plan.splitlines() if line.strip()}
    assert lines["embed/embedding"][-5] == "no" and lines["head/kernel"][-5] == "yes"
    # of 2 layers of 16 x 32, the second trains
    assert lines["layers/mlp/up/kernel"][-6:-2] == ["layers", "1", "1.02k", "512"]
    assert "of full training's" in answers.plan


def test_lineage_goes_back_to_the_first_pretraining_step(whole, answers):
    digests = tiny.digests(whole.workdir)
    chain = answers.lineage.split("\nfinetune\n")[1].split("\n\n")[0].splitlines()
    assert [f"/{stage} step 10" in line for stage, line in zip(tiny.STAGES, chain, strict=False)] == [True] * 3
    assert all(digests[stage][:12] in line for stage, line in zip(tiny.STAGES, chain, strict=False))


def test_report_writes_the_page_and_the_matrix_again_from_the_files_of_a_run(answers):
    for name in ("report.md", "matrix.json"):
        assert (answers.copy / name).read_bytes() == answers.written[name]
    shown = {f"figures/{path.name}" for path in (answers.copy / "figures").iterdir()}
    assert shown == set(re.findall(r"\]\((figures/.*?)\)", answers.written["report.md"].decode()))
    assert "Report:" in answers.report and "finetune" in answers.report


def test_a_report_of_two_runs_compares_them(whole, answers):
    text = (whole.base / "compared" / "report.md").read_text()
    assert "better than" in text.splitlines()[2] and "0 cannot be compared" in text
    assert "## Training loss" in text and text.count("No difference.") == 2
    assert "compared/report.html" in answers.report_both


def test_a_stage_keeps_windows_with_their_targets_for_the_report(whole):
    windows = {name: json.loads((whole.workdir / name / "data_sample.json").read_text()) for name in tiny.STAGES}
    assert {len(each) for each in windows.values()} == {3}
    assert all(mark for (_, mark) in windows["pretrain"][0][1:]), "each token after the first is a target"
    labels = {text for window in windows["finetune"] for text, mark in window if mark}
    assert labels <= {"general", "domain"}
    assert "«general»" in (whole.workdir / "report.md").read_text()


def test_compare_shows_two_runs_side_by_side(answers):
    tables = [part.splitlines() for part in answers.compare.split("\n\n")]
    accuracy = next(lines for lines in tables if lines[0] == "task accuracy, %")
    assert [line.split()[0] for line in accuracy[3:]] == ["finetune", "scratch"]
    assert all(line.split()[1] == line.split()[2] for line in accuracy[3:])
    assert "data unknown" not in answers.compare and "other data" not in answers.compare
    assert answers.compare.count("\n  no difference\n") == 2, "in their configs, and in code and tokenizer"


def test_a_row_has_the_wall_time_of_each_part_and_the_cost_of_its_chain(whole):
    rows = tiny.rows(whole.workdir)
    for stage in tiny.STAGES:
        spent = rows[stage]["wall_seconds"]
        assert spent.keys() == {"prepare", "compile", "train", "evaluate", "save"}
        assert spent["train"] >= rows[stage]["seconds"] and min(spent.values()) > 0
    chain = [rows[stage] for stage in ("pretrain", "posttrain", "finetune")]
    assert rows["finetune"]["chain"]["tokens"] == sum(row["tokens"] for row in chain)
    assert rows["finetune"]["chain"]["stages"] == ["pretrain", "posttrain"]


def test_a_report_names_the_commit_and_links_the_resolved_config(whole):
    text = (whole.workdir / "report.md").read_text()
    assert "- commit: " in text and "(config.resolved.json)" in text and "  sequence_length = 32" in text
    resolved = json.loads((whole.workdir / "config.resolved.json").read_text())
    assert resolved["stages"]["pretrain"]["steps"] == 10
    assert json.loads((whole.workdir / "sessions.json").read_text())[0]["stages"] == [*tiny.STAGES]


@pytest.mark.slow
def test_wall_time_adds_up_over_the_starts_of_a_run(disturbed):
    sessions = json.loads((disturbed.workdir / "sessions.json").read_text())
    assert "scratch" in sessions[-1]["stages"] and len(sessions) >= 3
    for row in (tiny.rows(disturbed.workdir)[stage] for stage in tiny.STAGES):
        assert row["wall_seconds"]["train"] >= row["seconds"]


def test_predictions_on_the_file_of_an_evaluation_are_those_of_the_evaluation(whole, answers):
    rows = [json.loads(line) for line in (whole.base / "labels.jsonl").read_text().splitlines()]
    right = [row["label"] == row["input_label"] for row in rows]
    assert sum(right) / len(right) == tiny.rows(whole.workdir)["finetune"]["task_accuracy"]
    assert len(rows) == tiny.rows(whole.workdir)["finetune"]["task_items"]
    scores = list(csv.DictReader((whole.base / "scores.csv").open()))
    texts = (whole.base / "texts" / "general-validation.jsonl").read_text().splitlines()
    assert [row["text"] for row in scores] == [json.loads(line)["text"] for line in texts]
    keys = [hashlib.sha256(json.dumps([row["text"], ""]).encode()).digest()[24:] for row in scores]
    sample = sorted(range(len(keys)), key=keys.__getitem__)[:4]  # the documents of the evaluation
    nats, size = (sum(float(scores[i][name]) for i in sample) for name in ("nats", "bytes"))
    expected = tiny.rows(whole.workdir)["pretrain"]["general_bits_per_byte"]
    assert nats / math.log(2) / size == pytest.approx(expected, rel=1e-5)

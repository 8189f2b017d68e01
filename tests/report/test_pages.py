"""The report: its numbers, the sentences computed from them, and metrics files that survive a kill."""

import io
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from llm3.errors import UserError
from llm3.report import units
from llm3.report.figures import figures
from llm3.report.logs import MetricsWriter, read_metrics
from llm3.report.material import Material
from llm3.report.matrix import KEYS, complete, metrics_of, read_matrix, write_matrix
from llm3.report.page import page, write_report
from llm3.report.table import markdown, print_table


def row(stage, general=None, domain=None, accuracy=None, **more):
    given = {
        "stage": stage,
        "general_bits_per_byte": general,
        "domain_bits_per_byte": domain,
        "task_accuracy": accuracy,
        "task_macro_f1": accuracy and accuracy / 2,
        "majority_accuracy": 0.31,
        "task_items": 400,
        "tokens": 1_234_567,
        "flops": 3.4e12,
        "seconds": 125.0,
        "peak_bytes": 3 * 2**29,
        "params": 3_400_000,
        "trainable_params": 3_400_000,
        "params_digest": "ab" * 32,
    }
    return {**given, **more}


ROWS = [
    row("init", 8.0, 8.0, tokens=0, flops=0, seconds=0.0, trainable_params=0),
    row("pretrain", 2.4, 2.3),
    row("posttrain", 2.5, 1.8),
    row("finetune", 2.75, 2.05, 0.75, trainable_params=1_200_000),
]
BASELINES = [row("scratch", accuracy=0.5, tokens=600_000)]


def printed(rows, baselines, **options):
    console = Console(file=io.StringIO(), **options)
    print_table(rows, baselines, console)
    return console.file.getvalue()


def sentences(rows, baselines=()):
    return page(Material(rows, list(baselines), title="T", command="run it", facts={"seed": 0}))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (999_600, "1.00M"), (12_345, "12.3k"), (123_456, "123k"), (3.4e12, "3.40T"), (None, "-")],
)
def test_counts_have_three_digits_and_a_letter(value, text):
    assert units.count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0s"), (59.94, "59.9s"), (59.96, "1m 00s"), (125, "2m 05s"), (11_220, "3h 07m"), (187_300, "2d 04h")],
)
def test_durations_have_at_most_two_units(seconds, text):
    assert units.duration(seconds) == text


def test_the_columns_are_in_the_order_of_the_evaluations():
    stage = {"stage": "only", "task_accuracy": 0.5, "domain_bits_per_byte": 2.0, "general_bits_per_byte": 1.0}
    rows, _ = complete([stage], [])
    assert [metric.evaluation for metric in metrics_of(rows)] == ["domain", "general", "task"], "bits per byte first"


def test_the_matrix_has_every_key_and_null_where_nothing_applies(tmp_path):
    write_matrix(tmp_path / "matrix.json", [{"stage": "only", "code_exact_match": 0.5}], [])
    rows, baselines = read_matrix(tmp_path / "matrix.json")
    assert {*KEYS} <= {*rows[0]}
    assert rows[0]["code_exact_match"] == 0.5
    assert rows[0]["tokens"] is None
    assert baselines == []
    assert [path.name for path in tmp_path.iterdir()] == ["matrix.json"]


def test_forgetting_is_the_change_against_the_parent_row(tmp_path):
    other = row("other", 2.2, 2.0, parent="pretrain")
    write_matrix(tmp_path / "m.json", [*ROWS, other], [*BASELINES, row("late", 2.6, parent="posttrain")])
    rows, (scratch, late) = read_matrix(tmp_path / "m.json")
    changes = [row["general_bits_per_byte_change"] for row in rows]
    assert changes == [None, *(pytest.approx(change) for change in (-5.6, 0.1, 0.25, -0.2))]
    assert rows[2]["domain_bits_per_byte_change"] == pytest.approx(-0.5)
    assert scratch["general_bits_per_byte_change"] is None
    assert late["general_bits_per_byte_change"] == pytest.approx(0.1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, np.float32("nan")])
def test_a_metric_that_is_not_finite_is_rejected_and_the_old_file_stays(tmp_path, bad):
    write_matrix(tmp_path / "m.json", ROWS, [])
    with pytest.raises(ValueError, match="task_accuracy of posttrain"):
        write_matrix(tmp_path / "m.json", [*ROWS[:2], row("posttrain", accuracy=bad)], [])
    assert len(read_matrix(tmp_path / "m.json")[0]) == 4


def test_scalars_of_numpy_are_written_as_numbers(tmp_path):
    write_matrix(tmp_path / "m.json", [row("a", np.float32(2.5), tokens=np.int64(7))], [])
    written = json.loads((tmp_path / "m.json").read_text())["rows"][0]
    assert (written["general_bits_per_byte"], written["tokens"]) == (2.5, 7)


@pytest.mark.parametrize("options", [{}, {"soft_wrap": True}])
def test_the_table_shows_metrics_changes_costs_and_the_baseline_below_a_rule(options):
    text = printed(ROWS, BASELINES, **options)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 120
    posttrain = next(line for line in lines if line.startswith("posttrain"))
    for figure in ("2.500 (+0.100)", "1.800 (-0.500)", "31.0 %", "1.23M", "3.40T", "2m 05s", "1.50"):
        assert figure in posttrain
    assert "1.20M of 3.40M" in text
    assert set(lines[-2]) == {"─"}
    assert lines[-1].startswith("scratch")


def test_a_narrow_terminal_gets_two_tables_and_no_folded_number():
    text = printed(ROWS, BASELINES, width=80, force_terminal=True, color_system=None)
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("posttrain") == 2
    assert "2.500 (+0.100)" in text


def test_columns_come_from_the_rows():
    rows = [{"stage": "sft", "quiz_exact_match": 0.25, "code_bits_per_byte": 1.5, "quiz_items": 8, "notes": 3}]
    head = markdown(rows, []).splitlines()[0]
    assert "| stage | code bits/byte | quiz exact match | tokens |" in head
    assert "general" not in head
    assert "notes" not in head
    assert "items" not in head


def test_markdown_has_one_line_a_row_and_baselines_in_italics():
    lines = markdown(ROWS, BASELINES).splitlines()
    assert len(lines) == 2 + len(ROWS) + 1
    assert len({line.count("|") for line in lines}) == 1
    assert lines[-1].startswith("| *scratch* | - | - | *50.0 %* |")


def test_sentences_say_what_was_gained_forgotten_and_paid():
    text = sentences(ROWS, BASELINES)
    assert "Domain: 2.300 → 1.800 bits per byte (-21.7 %)." in text
    assert "Forgetting: general text costs 0.100 bits a byte more than after pretrain." in text
    assert "1.23M tokens, 3.40T FLOPs, 2m 05s, 1.50 GiB at the peak, 1.20M of 3.40M parameters trained." in text
    assert text.count("Forgetting: ") == 2, "an untrained parent has nothing to forget"


def test_what_was_measured_on_other_data_is_shown_as_such_and_not_as_a_change():
    """The general text changed after pretrain was measured: of each evaluation, the data of most rows counts."""
    old, new = {"general": "old", "domain": "same"}, {"general": "new", "domain": "same"}
    rows = [each | {"evaluation_digests": old if each["stage"] == "pretrain" else new} for each in ROWS]
    table = {line.split()[0]: line for line in printed(rows, BASELINES).splitlines() if line.strip()}
    assert "2.400 (other data)" in table["pretrain"] and "2.500 " in table["posttrain"]
    assert "2.300" in table["pretrain"] and "1.800 (-0.500)" in table["posttrain"]
    text = sentences(rows, BASELINES)
    assert "(other data): the evaluation measured this stage on other documents" in text
    assert text.count("General: measured on other data than pretrain, so not compared.") == 1
    assert "Domain: 2.300 → 1.800 bits per byte (-21.7 %)." in text and "2.400 (pretrain)" not in text
    assert "Forgetting: none; no text costs more bits than after pretrain." in text
    assert "(other data)" not in sentences(ROWS, BASELINES)


def test_sentences_stay_true_where_every_stage_made_things_worse():
    worse = [row("init", 2.0, 2.0, 0.5, tokens=0), row("a", 3.0, 3.0, 0.4), row("b", 2.9, 2.8, 0.3)]
    text = sentences(worse, [row("scratch", accuracy=0.32)])
    assert "General: 2.000 → 3.000 bits per byte (+50.0 %)." in text
    assert "Task: accuracy 50.0 % → 40.0 % (-10.0 points)." in text
    assert "Forgetting: none; no text costs more bits than after a." in text
    assert text.startswith(
        "# T\n\n**task: init has the highest accuracy, 50.0 %, where the most frequent class has 31.0 %"
    )


@pytest.mark.parametrize(
    "keys", [("task_items",), ("tokens", "flops", "seconds", "peak_bytes"), ("majority_accuracy",)]
)
def test_a_page_omits_values_that_the_rows_lack(keys):
    bare = [{key: value for key, value in row.items() if key not in keys} for row in ROWS]
    text = sentences(bare, BASELINES)
    assert "None" not in text
    assert "nan" not in text


def test_a_report_is_a_page_its_figures_and_the_matrix(tmp_path):
    histories = {"pretrain": [{"step": step, "loss": 5.0 / step} for step in range(1, 30)], "empty": []}
    material = Material(ROWS, BASELINES, "T", "run it", histories, facts={"seed": 0})
    write_report(tmp_path / "r", material)
    names = sorted(path.name for path in (tmp_path / "r").iterdir())
    assert names == ["figures", "matrix.json", "report.html", "report.md"]
    text = (tmp_path / "r" / "report.md").read_text()
    assert text.startswith("# T\n")
    assert "```bash\nrun it\n```\n\n- seed: 0\n" in text
    figures = sorted(path.name for path in (tmp_path / "r" / "figures").iterdir())
    drawn = ["cost", "forgetting", "intervals_task", "lineage", "matrix", "progress"]
    assert figures == [f"{name}.svg" for name in drawn]


def test_plots_do_without_values_that_are_missing_or_not_finite():
    lines = [{"step": 1, "loss": None}, {"step": 2, "loss": math.nan}, {"step": 3, "loss": 1.0}]
    lines += [{"step": 3, "task_nll": 2.0, "task_accuracy": None}, {"step": 4, "domain_bits_per_byte": None}]
    bare = Material([{"stage": "a", "x_accuracy": 0.5}, {"stage": "b"}], histories={"a": lines})
    assert set(figures(bare)) == {"matrix.svg", "progress.svg", "lineage.svg"}
    assert all(draw().startswith("<svg") for draw in figures(bare).values())


def test_nothing_is_drawn_of_a_run_without_metrics_or_losses(tmp_path):
    write_report(tmp_path, Material([{"stage": "a"}]))
    assert {path.name for path in tmp_path.iterdir()} == {"report.md", "report.html", "matrix.json"}
    assert "![" not in (tmp_path / "report.md").read_text()


def test_metrics_are_read_back_with_numbers_of_numpy_and_null_for_nan(tmp_path):
    with MetricsWriter(tmp_path / "stage") as writer:
        writer.write(10, {"loss": np.float32(2.5), "mfu": None, "gradient_norm": math.nan})
        assert read_metrics(tmp_path / "stage") == [{"step": 10, "loss": 2.5, "mfu": None, "gradient_norm": None}]
    assert read_metrics(tmp_path / "nothing") == []


def test_resuming_repairs_a_torn_line_and_repeats_no_step(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in (10, 20, 30):
            writer.write(step, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')
    assert [line["step"] for line in read_metrics(tmp_path)] == [10, 20, 30]
    with MetricsWriter(tmp_path, resume_step=20) as writer:
        writer.write(30, {"loss": 2.0})
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [(10, 1.0), (20, 1.0), (30, 2.0)]


def test_a_line_that_is_broken_in_the_middle_of_the_file_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nrubbish\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: .*rubbish"):
        read_metrics(tmp_path)


def test_importing_the_report_loads_no_slow_library():
    script = "import sys, llm3.report.{}, llm3.report.logs, llm3.report.console; print(*sys.modules)"
    slow = {"matplotlib", "markdown_it", "rich", "tensorboardX", "jax", "scipy"}
    for module, others in (("units", {"numpy"}), ("page", set()), ("compare", set())):
        command = [sys.executable, "-c", script.format(module)]
        loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        assert not (slow | others) & set(loaded)

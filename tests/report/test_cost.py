"""The cost of partial fine-tuning compared with full fine-tuning, and statistics over seeds."""

import io
import json

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from llm3.report import replicates, units
from llm3.report.comparisons import comparisons
from llm3.report.entries import entries, main_measure
from llm3.report.figures import figures, seed_panels
from llm3.report.material import Material
from llm3.report.matrix import complete, read_matrix
from llm3.report.page import page, write_report
from llm3.report.plots.dots import plot_dots
from llm3.report.progress import progress
from llm3.report.table import print_table

PARAMS = 1_000_000
ACCURACIES = {"full": (0.70, 0.72, 0.71), "top2": (0.66, 0.675, 0.67), "biases": (0.60, 0.80, 0.70)}
TRAINED = {"full": PARAMS, "top2": 250_000, "biases": 20_000}


def stage(name, trained=PARAMS, general=2.0, accuracy=None, **more):
    given = {
        "stage": name,
        "parent": "posttrain",
        "general_bits_per_byte": general,
        "task_accuracy": accuracy,
        "task_items": 815,
        "majority_accuracy": 0.3,
        "tokens": 300_000,
        "flops": 3e12,
        "seconds": 40.0,
        "peak_bytes": 2**30,
        "params": PARAMS,
        "trainable_params": trained,
        "param_bytes": 4 * PARAMS,
        "gradient_bytes": 4 * trained,
        "moment_bytes": 8 * trained,
        "temp_bytes": 2**29,
        "forward_flops_per_token": 2e6,
        "backward_flops_per_token": 2e6 if trained < PARAMS else 4e6,
        "step_seconds": 0.05 if trained < PARAMS else 0.1,
        "full_gradient_bytes": 4 * PARAMS,
        "full_moment_bytes": 8 * PARAMS,
        "full_flops_per_token": 6e6,
        "full_step_seconds": 0.1,
    }
    return given | more


def replicated(*names):
    """A parent and three seeds of each recipe, in alphabetical order as in a run."""
    return [
        stage("posttrain", parent=None),
        *(
            stage(f"{name}_{seed}", TRAINED[name], 2.1 + seed / 100, accuracy, seed=seed, recipe=f"id of {name}")
            for name in sorted(names)
            for seed, accuracy in enumerate(ACCURACIES[name])
        ),
    ]


def printed(rows, baselines=()):
    console = Console(file=io.StringIO())
    print_table(rows, list(baselines), console)
    return console.file.getvalue()


def sentences(rows, baselines=()):
    return page(Material(rows, list(baselines), title="T"))


def cells(text, name, head=""):
    """The cells of the last table row of `text` that is called `name`, if given of the first table with this `head`."""
    part = text.split(f"| {head} |")[1].split("\n\n")[0] if head else text
    line = [line for line in part.splitlines() if line.startswith(f"| {name} |")][-1]
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0123, "0.012"), (0.3456, "0.346"), (12.34, "12.3"), (-5.678, "-5.68"), (1e5, "100000")],
)
def test_sizes_and_times_have_three_digits_and_no_powers_of_ten(value, text):
    assert units.digits(value) == text
    assert units.mebibytes(value * 2**20) == text


def test_each_stage_shows_the_cost_of_a_step_compared_with_full_fine_tuning():
    text = sentences([stage("posttrain"), stage("top", 250_000)])
    assert "## Cost of a step" in text
    shares = ["250k (25 %)", "3.81", "0.954 (25 %)", "1.91 (25 %)", "512", "2.00M + 2.00M (67 %)", "50.0 (50 %)"]
    assert cells(text, "top")[1:] == shares
    assert cells(text, "posttrain")[-2:] == ["2.00M + 4.00M (100 %)", "100 (100 %)"]


def test_a_share_is_not_shown_if_no_stage_of_the_run_trains_all_parameters():
    text = sentences([stage("posttrain"), stage("top", 250_000, full_step_seconds=None, temp_bytes=None)])
    assert cells(text, "top")[-1] == "50.0"
    assert cells(text, "top")[5] == "-"
    assert "None" not in text


def test_rows_without_step_costs_have_no_such_section():
    old = [{"stage": "a", "params": 5, "trainable_params": 3, "tokens": 1}, {"stage": "b", "tokens": 1}]
    assert "Cost of a step" not in sentences(old)
    assert "Cost of a step" not in printed(old)
    assert "Over seeds" not in sentences(old)


def test_the_terminal_shows_step_costs_only_if_a_stage_has_frozen_parameters():
    text = printed([stage("posttrain"), stage("top", 250_000)])
    assert "Cost of a step" in text
    assert "2.00M + 2.00M (67 %)" in text
    assert max(map(len, text.splitlines())) <= 120
    assert "Cost of a step" not in printed([stage("pretrain"), stage("posttrain")])


def test_replicates_are_one_row_of_means_on_the_terminal_with_a_note():
    rows = replicated("full", "top2", "biases")
    text = printed(rows)
    assert max(map(len, text.splitlines())) <= 120
    assert "the mean over N stages that differ only in their seed" in text
    line = next(line for line in text.splitlines() if line.startswith("full x3"))
    assert "71.0 %" in line
    assert "2.110 (+0.110)" in line
    assert "full_0" not in text
    assert text.count("biases x3") == 2, "once in each table"


def test_the_matrix_keeps_the_row_of_every_seed(tmp_path):
    rows = replicated("full", "top2")
    histories = {row["stage"]: [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}] for row in rows}
    write_report(tmp_path, Material(rows, histories=histories))
    kept, _ = read_matrix(tmp_path / "matrix.json")
    assert [row["stage"] for row in kept] == [row["stage"] for row in rows]
    assert [row["seed"] for row in kept] == [None, 0, 1, 2, 0, 1, 2]
    assert "(figures/seeds.svg)" in (tmp_path / "report.md").read_text()
    json.loads((tmp_path / "matrix.json").read_text())


def test_without_replicates_there_is_no_plot_over_seeds():
    assert "seeds.svg" not in figures(Material([stage("a", seed=0, recipe="x")]))


@pytest.mark.parametrize("values", [[0.1, 0.5], [3.0, 3.0, 3.0], [1.0, 2.0, 4.0, 8.0, 7.5]])
def test_an_interval_is_that_of_students_t(values):
    found = replicates.estimate(values)
    assert found.mean == pytest.approx(np.mean(values))
    if (error := stats.sem(values)) > 0:
        low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=error)
        assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx((low, high))
    else:
        assert found.half_width == 0
    assert replicates.estimate([1.0]) is None


def test_differences_are_paired_by_seed_to_the_recipe_that_trains_all():
    text = sentences(replicated("full", "top2", "biases"))
    differences = np.array(ACCURACIES["top2"]) - np.array(ACCURACIES["full"])
    (low, high), mean = stats.t.interval(0.95, 2, differences.mean(), stats.sem(differences)), differences.mean()
    row = cells(text, "top2 - full", "accuracy, points")
    assert row[1:4] == [f"{100 * mean:.1f} [{100 * low:.1f}, {100 * high:.1f}]", "3 seeds", "t over seeds"]
    p = {name: stats.ttest_rel(ACCURACIES[name], ACCURACIES["full"]).pvalue for name in ("top2", "biases")}
    assert row[4] == f"{2 * p['top2']:.2g}", "two tests in this table"
    assert (row[5], cells(text, "biases - full", "accuracy, points")[5]) == ("worse", "no difference shown")


def test_differences_with_other_seeds_are_wider():
    shuffled = [
        row | {"seed": 2 - row["seed"]} if row["stage"].startswith("top2") else row
        for row in replicated("full", "top2")
    ]
    of = [
        comparisons(made, entries(made, "task"), main_measure(made, "task"))[0].difference
        for made in (Material(replicated("full", "top2")), Material(shuffled))
    ]
    assert of[0].value == pytest.approx(of[1].value)
    assert of[1].high - of[1].low > of[0].high - of[0].low


def test_the_page_says_what_the_intervals_are_of():
    text = sentences(replicated("full", "top2"))
    assert "all seeds start from one parent (posttrain) and are scored on the same items" in text
    assert "815 items; the most frequent class alone has 30.0 %." in text


def test_only_equal_recipes_with_several_seeds_are_replicates():
    a, b, c = (stage(f"a{seed}", seed=seed, recipe="a") for seed in (0, 1, 1))
    lonely, unknown = stage("b", seed=0, recipe="b"), stage("c", seed=None, recipe=None)
    rows, _ = complete([a, b, c | {"stage": "again"}, lonely, unknown, unknown | {"stage": "d"}], [])
    (found,) = replicates.recipes(rows)
    assert [row["stage"] for row in found.rows] == ["a0", "a1"]
    assert [row["stage"] for row in replicates.collapsed(rows)] == ["a x2", "again", "b", "c", "d"]
    assert [row["stage"] for row in replicates.unreplicated(rows)] == ["again", "b", "c", "d"]


@pytest.mark.parametrize(
    ("names", "label"),
    [
        (["top2_0", "top2_1"], "top2"),
        (["top2_10", "top2_11"], "top2"),
        (["full-1", "full-2"], "full"),
        (["full0", "full1"], "full"),
        (["one", "two"], "one"),
    ],
)
def test_a_recipe_is_called_what_the_names_of_its_stages_have_in_common(names, label):
    assert replicates.label(names) == label


def test_recipes_with_the_same_label_are_told_apart():
    rows = [stage(f"a_{n}", seed=n % 2, recipe="xy"[n // 2], accuracy=0.5) for n in range(4)]
    assert [each.label for each in replicates.recipes(complete(rows, [])[0])] == ["a_0", "a_2"]


def test_replicated_baselines_are_compared_as_well():
    rows = replicated("full")
    scratch = [
        stage(f"scratch_{seed}", parent="init", accuracy=0.5 + seed / 100, seed=seed, recipe="s") for seed in range(3)
    ]
    text = sentences(rows, scratch)
    assert "*scratch x3*" in text
    assert cells(text, "scratch - full", "accuracy, points")[1].startswith("-20.0 [")


def test_the_losses_of_a_recipe_are_a_thin_line_for_each_seed_and_their_mean():
    rows = replicated("full")
    histories = {f"full_{seed}": [{"step": s, "loss": float(seed)} for s in (1, 2)] for seed in range(3)}
    panel = next(each for each in progress(Material(rows, histories=histories)) if each.title == "training loss")
    assert [(each.label, each.thin, {y for _, y in each.points}) for each in panel.curves] == [
        *(("", True, {float(seed)}) for seed in range(3)),
        ("full", False, {1.0}),
    ]


def test_the_plot_over_seeds_has_every_seed_of_every_recipe():
    panels = seed_panels(Material(replicated("full", "top2", "biases")))
    accuracy = next(each for each in panels if each.x_name == "task accuracy, %")
    assert [row.label for row in accuracy.rows] == ["full (1.00M)", "biases (20.0k)", "top2 (250k)"]
    for row in accuracy.rows:
        own = [100 * value for value in ACCURACIES[row.label.split()[0]]]
        assert row.values == own and row.mean[0] == pytest.approx(sum(own) / 3)
    svg = plot_dots([accuracy])
    assert all(f">{row.label}<" in svg for row in accuracy.rows)

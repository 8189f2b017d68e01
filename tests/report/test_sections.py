"""The sections of the report beside the comparisons: plots, single items, time, cost and settings."""

import json

import numpy as np
import pytest

from llm3.config import load
from llm3.config.schema import as_dict
from llm3.report import examples, settings, time_spent
from llm3.report.figures import confusions, figures, reliabilities
from llm3.report.material import Material
from llm3.report.page import data_section, page, write_report
from llm3.report.statistics import calibration_error
from tests.helpers import tiny_report, tiny_run
from tests.helpers.tiny_report import CLASSES, SHARES, confusion, task


@pytest.fixture(scope="module")
def run():
    histories = {name: [{"step": step, "loss": 3 / step} for step in range(1, 9)] for name in ("pretrain", *SHARES)}
    details = {name: confusion(name) for name in SHARES}
    return tiny_report.material(title="Run tiny", command="run it", histories=histories, details=details)


def test_a_report_has_a_figure_for_each_part_and_equal_files_when_written_again(tmp_path, run):
    for name in ("one", "two"):
        write_report(tmp_path / name, run)
    plots = {"matrix", "progress", "seeds", "cost", "forgetting", "lineage", "confusion_task", "reliability_task"}
    plots |= {"intervals_task", "intervals_general"}
    assert set(figures(run)) == {f"{name}.svg" for name in plots}
    one, two = (tiny_run.files(tmp_path / name) for name in ("one", "two"))
    assert set(one) == {f"figures/{name}.svg" for name in plots} | {"report.md", "report.html", "matrix.json"}
    assert {name: content for name, (_, content) in one.items()} == {
        name: content for name, (_, content) in two.items()
    }
    text, page = ((tmp_path / "one" / name).read_text() for name in ("report.md", "report.html"))
    assert all(text.count(f"](figures/{name}.svg)") == 1 for name in plots)
    assert page.count("<svg") == len(plots) and len(page.encode()) < 400_000
    assert text.splitlines()[2].startswith("**task: ")


def test_the_heat_map_adds_up_the_seeds_of_a_recipe(run):
    classes, counts = confusions(run, "task")
    assert classes == CLASSES and list(counts) == ["full", "top", "scratch"]
    seeds = [np.array(confusion(f"full_{seed}")["task_confusion"]["counts"]) for seed in range(3)]
    assert np.array_equal(counts["full"], sum(seeds)) and counts["full"].sum() == 360


def test_the_reliability_diagram_shows_the_calibration_error_of_the_predictions(run):
    bins = reliabilities(run, "task")
    assert list(bins) == ["full", "top", "scratch"]
    columns = task("scratch")
    edges = np.ceil(columns["confidence"] * 15)
    parts = [edges == edge for edge in np.unique(edges)]
    gaps = [abs((columns["score"] - columns["confidence"])[part].sum()) for part in parts]
    assert calibration_error(bins["scratch"]) == pytest.approx(sum(gaps) / 120)


def test_the_most_confident_errors_of_the_last_stage_are_listed(run):
    text = "\n".join(examples.errors_section(run))
    columns = task("top_0")
    wrong = np.flatnonzero(columns["score"] == 0)
    first = wrong[np.argmax(columns["confidence"][wrong])]
    lines = text.split("| :-- | :-- | :-- | :-- |\n")[1].splitlines()
    assert lines[0].split(" | ")[:3] == [f"| {2 * first}", columns["truth"][first], columns["prediction"][first]]
    assert len(lines) == min(len(wrong), examples.ERRORS)
    assert f"{len(wrong)} of 120 are wrong" in text


def test_samples_of_the_last_step_stand_side_by_side():
    line = {"step": 5, "prompt": "Once", "text": "upon"}
    samples = {"pretrain": [line | {"text": "old"}, line | {"step": 9}], "finetune": [line | {"text": "a | b\n" * 99}]}
    (_, table) = examples.samples_section(Material([], samples=samples))
    heads, _, cells = table.splitlines()
    assert heads == "| prompt | pretrain | finetune |"
    assert cells.startswith("| Once | upon | a \\| b a") and cells.endswith("… |") and "old" not in table
    assert examples.samples_section(Material([])) == []


def test_the_windows_of_a_stage_are_shown_with_their_targets_marked():
    samples = {"finetune": [[("a label of ```\nthis: ", False), ("«cause»", True)]]}
    (_, _, stage, block) = data_section(Material([], data_samples=samples))
    assert stage == "**finetune**"
    assert block == "````marked\na label of ```⏎this: «\u2039cause\u203a»\n````"
    assert data_section(Material([])) == []


def test_resources_are_summed_over_seeds_stages_and_sessions():
    spent = {"compile": 3.0, "train": 60.0, "evaluate": 10.0}
    rows = [each | {"wall_seconds": spent, "peak_bytes": 2**30} for each in tiny_report.rows()]
    rows[3]["peak_bytes"] = 2**31
    made = Material(rows, wall_seconds={"tokenize": 5.0}, sessions=[("2026-01-01", 100.0), ("2026-01-02", 500.0)])
    parts = time_spent.resources_section(made)
    assert "|  | tokens | FLOPs | peak GiB | tokenizing | compiling | training | evaluating | sum |" in parts[1]
    assert "| full x3 | 30 | 3.00G | 2.00 | - | 9.0s | 3m 00s | 30.0s | 3m 39s |" in parts[1]
    assert "| **all** | 80 | 8.00G | 2.00 | 5.0s | 24.0s | 8m 00s | 1m 20s | 9m 49s |" in parts[1]
    assert parts[3] == "2 sessions, the first from 2026-01-01: 10m 00s in all."
    assert time_spent.resources_section(Material([{"stage": "a"}])) == []


def test_the_cost_of_a_chain_names_its_stages_and_what_nobody_recorded():
    chain = {"stages": ["SmolLM2", "posttrain"], "unknown": ["SmolLM2"], "tokens": 5e6, "flops": 1e15, "seconds": 90.0}
    text = "\n".join(time_spent.chain_section(Material([{"stage": "finetune", "chain": chain}, {"stage": "old"}])))
    assert "| SmolLM2 → posttrain → finetune (without SmolLM2) | 5.00M | 1.00P | 1m 30s |" in text
    assert "old" not in text


MEDICAL = str(tiny_run.ROOT / "configs" / "medical.py")


def test_only_fields_that_are_no_defaults_are_shown_and_once_for_all_seeds():
    lines = settings.changed(load.load(MEDICAL))
    assert "model.layers = 6" in lines and not any(line.startswith("mesh") for line in lines)
    assert "stages.{full_0,full_1,full_2}.seed = 0, 1, 2" in lines
    assert sum("full_" in line and ".steps = 150" in line for line in lines) == 1
    assert not any(".guard" in line or "log_every = 10" in line for line in lines)
    text = page(Material([{"stage": "a"}], settings=lines))
    assert "stages.{top2_0,top2_1,top2_2}\n  kind = 'finetune'\n" in text


@pytest.mark.parametrize("file", sorted(tiny_run.ROOT.glob("configs/*.py")), ids=lambda file: file.stem)
def test_a_config_can_be_read_again_from_its_resolved_values(file):
    try:
        config = load.load(str(file))
    except Exception as error:  # of a pretrained model that is not here
        pytest.skip(str(error))
    assert load.read(json.loads(json.dumps(as_dict(config)))) == config

"""The report of an ablation: what it shows, that it is the same each time, and that it stays small."""

import io
import json
import re

import pytest
from rich.console import Console
from scipy import stats

from llm3.ablation.analysis import Analysis
from llm3.ablation.materials import groups, material
from llm3.ablation.pairs import cells
from llm3.ablation.report import page
from llm3.ablation.sections import arms, comparisons, grids, more, opening, origin, stages
from llm3.ablation.sections.curves import Curves, mean
from llm3.ablation.sections.parts import Figure
from llm3.ablation.terminal import WIDTH, print_summary
from llm3.cli import checks
from llm3.cli.report import report
from llm3.config.schema import as_dict
from llm3.errors import UserError
from llm3.files import PLAN, REPORT, SAMPLES, write_json
from llm3.report.html import page_html
from llm3.report.plots.verdict_map import VerdictCell, turns
from tests.helpers.tiny_study import BETTER, EVIL, OLD, comparison, in_grid, many, study


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Markdown and figures of two equal ablations in two places, and of a grid."""
    places = [tmp_path_factory.mktemp("one") / "a", tmp_path_factory.mktemp("two") / "a"]
    return [page(Analysis(many(place))) for place in places], page(Analysis(in_grid(places[0].parent / "grid")))


def text_of(section, own):
    return "\n".join(part for part in section(Analysis(own)) if isinstance(part, str))


def test_equal_directories_give_the_same_page_wherever_they_are(pages):
    (one, other), _ = pages
    assert one == other


def test_a_page_has_no_date_and_is_under_a_megabyte(pages):
    for markdown, figures in [pages[0][0], pages[1]]:
        html = page_html("T", markdown, figures)
        assert len(html.encode()) < 1e6
        assert not re.search(r"20\d\d-\d\d-\d\d", html)


def test_every_figure_is_drawn_and_shown_once(pages):
    for markdown, figures in [pages[0][0], pages[1]]:
        assert sorted(re.findall(r"\(figures/([\w.]+)\)", markdown)) == sorted(figures)
    assert {"seeds.svg", "comparisons.svg", "cost.svg", "progress.svg", "forgetting.svg", "lineage.svg"} <= {
        *pages[0][0][1]
    }
    assert "calibration.svg" in pages[0][0][1]
    assert "map.svg" in pages[1][1]


def test_names_and_notes_are_shown_as_they_are(pages):
    (markdown, figures), _ = pages[0]
    html = page_html("T", markdown, figures)
    assert "<b>" not in html and "<i>" not in html
    assert "&lt;b&gt;a|b&lt;/b&gt;" in html


def test_sections_are_all_there(pages):
    heads = re.findall(r"^## (.*)", pages[0][0][0], flags=re.MULTILINE)
    assert heads == [
        "Arms",
        "Comparisons",
        "Literature",
        "Other metrics",
        "Quality against cost",
        "Stages, evaluations and resources",
        "Forgetting",
        "Training",
        "Calibration",
        "Lineage",
        "What would be needed to know more",
        "Failed stage runs",
        "Differences between arms",
        "How to reproduce it",
    ]


def test_arms_show_every_seed_and_the_mean_with_its_interval(tmp_path):
    own = study(tmp_path, {"old": OLD, "new": [0.6, None, 0.5, 0.7, 0.6]})
    heads, (old, new) = arms.arms_table(Analysis(own))
    half = stats.t.ppf(0.975, 4) * stats.sem(OLD)
    assert heads[:3] == ["arm", "each seed", "mean"]
    assert old[:3] == ["old", "50.0, 53.0, 49.0, 52.0, 51.0", f"51.0 ± {100 * half:.1f} %"]
    assert new[1] == "60.0, -, 50.0, 70.0, 60.0"


def test_unequal_budgets_adjusted_steps_and_missing_seeds_are_named(tmp_path):
    found = list(arms.notes(Analysis(many(tmp_path))))
    assert f"Not equal in flops to old, by more than 1 %: {EVIL} (+4 %)" in found
    assert f"{EVIL}: pretrain trains 140 steps instead of 100, to match flops" in found
    assert f"{EVIL}: not finished with seed 3" in found


def test_the_table_of_comparisons_says_what_was_declared_and_when(tmp_path):
    heads, (line,) = comparisons.comparisons_table(Analysis(many(tmp_path)))
    cells_of = dict(zip(heads, line, strict=True))
    assert cells_of["comparison"] == "main"
    assert (cells_of["expected"], cells_of["smallest"], cells_of["declared after"]) == ("better", "2.0", "0")
    assert cells_of["seeds"] == "4"


def test_the_seeds_say_what_they_change():
    assert arms.varied(["pretrain", "finetune.init"]).startswith(
        "The seed changes new parameters and the order of the data in pretrain and new parameters in finetune:"
    )
    assert arms.varied([]) == "The seed changes nothing: intervals over seeds say nothing."


@pytest.mark.parametrize(
    ("values", "expect", "says"),
    [(BETTER, "better", "agrees"), (BETTER, "worse", "disagrees"), (OLD[::-1], "better", "undecided")],
)
def test_the_literature_agrees_disagrees_or_is_undecided(tmp_path, values, expect, says):
    declared = {"a": comparison(expect=expect, literature="Doe 2020: <it> helps")}
    text = text_of(comparisons.literature, study(tmp_path, {"old": OLD, "new": values}, comparisons=declared))
    assert f"**{says}**" in text and r"Doe 2020: \<it\> helps" in text


def test_in_a_grid_the_literature_is_counted_in_cells(tmp_path):
    assert "**disagrees in 2 of 6 cells, agrees in 4 of 6 cells**" in text_of(comparisons.literature, in_grid(tmp_path))


def test_undecided_comparisons_say_what_would_decide_them(tmp_path):
    own = study(
        tmp_path, {"old": OLD, "new": [0.49, 0.55, 0.48, 0.55, 0.50]}, comparisons={"a": comparison(smallest=0.01)}
    )
    assert re.search(r"- a: about [\d,]+ seeds \(5 so far\), with a power of 80%", text_of(more.what_is_needed, own))


def test_failed_stage_runs_have_their_reason_without_the_place_of_the_ablation(tmp_path):
    text = text_of(origin.failures, many(tmp_path))
    assert "exit 1: runs/x: loss is not finite" in text
    assert "with seed 3" in text and str(tmp_path) not in text


def test_the_environment_has_no_dates_and_no_paths(tmp_path):
    own = study(tmp_path, {"old": OLD, "new": OLD})
    for name, commit in (("finetune-0-0", "b"), ("finetune-1-0", "a")):
        session = {"started": "2026-01-01T00:00", "command": f"run {tmp_path}", "environment": {"commit": commit}}
        write_json(tmp_path / "runs" / name / "sessions.json", [session | {"facts": {"devices": "1 x cpu"}}])
    assert origin.environment(own) == {"commit": ["a", "b"], "devices": ["1 x cpu"]}


def test_a_stage_that_arms_share_is_one_group_and_one_node(tmp_path):
    own = study(tmp_path, {"old": OLD, "new": BETTER})
    found = groups(cells(own)[""])
    assert [(each.label, each.arms, each.parent) for each in found] == [
        ("old + new: pretrain", ["old", "new"], ""),
        ("old: finetune", ["old"], "old + new: pretrain"),
        ("new: finetune", ["new"], "old + new: pretrain"),
    ]
    made = material(own, cells(own)[""])
    assert [row["stage"] for row in made.shown] == ["old + new: pretrain x5", "old: finetune x5", "new: finetune x5"]
    assert made.shown[1]["task_accuracy"] == pytest.approx(sum(OLD) / 5)


def test_curves_are_a_thin_line_for_each_seed_and_their_mean_from_the_end_of_the_parent(tmp_path):
    own = study(tmp_path, {"old": OLD, "new": BETTER}, history=True)
    loss = Curves(own, cells(own)[""]).panels([Analysis(own).measure])[0]
    assert [curve.thin for curve in loss.curves] == ([True] * 5 + [False]) * 3
    assert [curve.label for curve in loss.curves if curve.label] == ["old", "new"]
    assert loss.handoffs == [(1000.0, "finetune")]
    assert loss.curves[6].points[0][0] == 1100 and loss.curves[6].points[-1] == (2000, pytest.approx(2.5))
    places, values = zip(*loss.curves[5].points, strict=True)
    assert places == pytest.approx([100 * step for step in range(1, 11)])
    assert values == pytest.approx([3.1 - 0.1 * step for step in range(1, 11)])


def test_the_mean_of_lines_of_unequal_length_is_taken_place_by_place():
    assert mean([[(1, 2.0), (2, 4.0)], [(1, 4.0)]]) == [(1, 3.0), (2, 4.0)]


def test_the_line_in_a_map_is_where_neighbours_have_other_verdicts():
    a, b = VerdictCell(1.0, "+1", "1"), VerdictCell(0.1, "+0.1", "0")
    assert list(turns([[a, b], [a, None]])) == [((0.5, 0.5), (-0.5, 0.5))]
    assert list(turns([[a], [b]])) == [((-0.5, 0.5), (0.5, 0.5))]


def test_a_map_marks_the_cells_in_which_a_difference_is_shown(tmp_path):
    own = Analysis(in_grid(tmp_path))
    (text, figure, *_) = grids.section(own)
    assert text == "## Over share and labels"
    assert figure.svg.count("▲") == 4 and figure.svg.count("▼") == 2
    assert opening.headline(own) == (
        "In task accuracy, new against old is better in 4 and worse in 2 of 6 cells (up: confirmed in 4, refuted in 2)."
    )


def test_the_terminal_shows_arms_verdicts_and_the_place_of_the_report(tmp_path):
    stream = io.StringIO()
    print_summary(Analysis(many(tmp_path)), Console(file=stream, width=140))
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines[:-1])) <= WIDTH
    assert any(line.startswith(EVIL) and "4 of 5" in line for line in lines)
    assert "1 stage run failed; the report says why" in lines
    assert lines[-1].startswith("Report: ")


def plan(path):
    """An ablation of which nothing is finished, as it is in its directory."""
    own = study(path, lambda arm, cell, seed: None, seeds=2)
    values = {"command": own.command, "config": as_dict(own.config), "comparisons": {}}
    write_json(path / PLAN, values | {"variants": [each._asdict() for each in own.variants]})


def test_report_writes_the_page_of_an_ablation_again_with_the_same_bytes(tmp_path):
    plan(tmp_path)
    assert report([tmp_path]) == 0
    first = {path.name: path.read_bytes() for path in tmp_path.glob("report.*")}
    assert report([tmp_path]) == 0
    assert {path.name: path.read_bytes() for path in tmp_path.glob("report.*")} == first
    assert "not compared, since no seed of new is finished" in (tmp_path / REPORT).read_text()


def test_an_ablation_is_reported_alone_and_by_its_own_config(tmp_path):
    plan(tmp_path)
    checks.check_report({"dirs": [tmp_path], "out": None, "config": None})
    with pytest.raises(UserError, match="is an ablation; expected it alone"):
        checks.check_report({"dirs": [tmp_path, tmp_path], "out": tmp_path / "x", "config": None})
    with pytest.raises(UserError, match="the report of an ablation is written from the config that it keeps"):
        checks.check_report({"dirs": [tmp_path], "out": None, "config": object()})


def test_a_stage_run_that_all_seeds_share_is_there_once_and_no_replicate(tmp_path):
    own = study(tmp_path, {"old": OLD, "new": BETTER})
    shared = {seed: ["pretrain-0", chain[1]] for seed, chain in own.variants[0].chains.items()}
    found = groups({"old": own.variants[0]._replace(chains=shared)})
    assert found[0].runs == {0: "pretrain-0"}
    assert len(found[1].runs) == 5


def test_values_of_a_grid_do_not_end_the_link_of_a_figure():
    assert Figure("map", "Over a=[1, 2] and b=]", "<svg/>").markdown == "![Over a=(1, 2) and b=)](figures/map.svg)"


def test_the_answers_to_a_prompt_stand_side_by_side_for_every_stage_of_the_first_seed(tmp_path):
    own = study(tmp_path, {"old": OLD, "new": BETTER}, history=True)
    for each in own.outcomes:
        for stage, folder in each.folders.items():
            lines = [{"step": step, "prompt": "Why?", "text": f"{stage} {each.seed} at {step}"} for step in (5, 10)]
            (folder / SAMPLES).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    text = text_of(stages.section, own)
    assert "| prompt | old + new: pretrain | old: finetune | new: finetune |" in text
    assert "| Why? | pretrain 0 at 10 | finetune 0 at 10 | finetune 0 at 10 |" in text


def test_of_a_grid_the_first_and_the_last_cell_show_their_stages(tmp_path):
    heads = [line for line in text_of(stages.section, in_grid(tmp_path)).splitlines() if line.startswith("## ")]
    assert heads == ["## Stages at share=1%, labels=50", "## Stages at share=100%, labels=all"]

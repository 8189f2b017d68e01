"""Curves over all stages, forgetting, and quality against cost, from the rows of a run."""

import pytest

from llm3.report.figures import column_shades, forest_panels, lineage, trade_offs
from llm3.report.forgetting import forgetting_panels, lost, section
from llm3.report.material import Material
from llm3.report.matrix import metrics_of
from llm3.report.progress import Axis, ends, progress
from tests.helpers import tiny_report


def row(stage, parent, general, tokens=10, **more):
    return {"stage": stage, "parent": parent, "general_bits_per_byte": general, "tokens": tokens, "flops": 2.0} | more


CHAIN = [
    row("init", None, 8.0, 0, flops=0.0),
    row("pre", "init", 2.0),
    row("post", "pre", 2.5),
    row("fit", "post", 2.4),
]


def of(rows, **options):
    return Material(rows, **options)


def test_each_stage_begins_where_its_parent_ends():
    material = of([*CHAIN, row("other", "pre", 3.0, 5)])
    assert ends(material, "tokens") == {"init": 0, "pre": 10, "post": 20, "fit": 30, "other": 15}
    assert Axis(material, "tokens").handoffs == [(0, "pre"), (10, "other"), (10, "post"), (20, "fit")]
    begun = of([row("post", None, 2.0, chain={"stages": ["a"], "tokens": 110, "flops": 5.0})])
    assert Axis(begun, "tokens").handoffs == [(100, "post")], "after the tokens of a parent elsewhere"


def test_the_loss_of_a_stage_lies_between_the_ends_of_its_parent_and_its_own():
    histories = {"post": [{"step": step, "loss": 1.0} for step in (0, 1, 2, 4)], "fit": [{"step": 4, "loss": 2.0}]}
    tokens, flops = (each for each in progress(of(CHAIN, histories=histories)) if each.title == "training loss")
    assert {each.label: [x for x, _ in each.points] for each in tokens.curves} == {
        "post": [10, 12.5, 15, 20],
        "fit": [30],
    }
    assert {each.label: [x for x, _ in each.points] for each in flops.curves} == {"post": [2, 2.5, 3, 4], "fit": [6]}


def test_the_evaluations_lead_from_the_parent_over_those_between_steps_to_the_end():
    lines = [{"step": 2, "general_bits_per_byte": 2.2}, {"step": 4, "loss": 1.0}]
    panel = next(each for each in progress(of(CHAIN, histories={"post": lines})) if each.y_name == "bits per byte")
    assert [each.points for each in panel.curves] == [
        [(10, 2.0)],  # its parent is untrained
        [(10, 2.0), (15, 2.2), (20, 2.5)],
        [(20, 2.5), (30, 2.4)],
    ]
    assert [each.label for each in panel.curves] == ["general bits/byte", "", ""]


def test_forgetting_is_the_change_since_the_best_trained_ancestor():
    material = of(CHAIN)
    (metric,) = metrics_of(material.stages)
    found = {each["stage"]: lost(material, each, metric) for each in material.stages}
    assert found["init"] is found["pre"] is None
    assert found["post"] == (pytest.approx(0.5), "pre") and found["fit"] == (pytest.approx(0.4), "pre")
    assert "| fit | +0.400 (since pre) |" in section(material)[1]
    (panel,) = forgetting_panels(material)
    assert [(each.label, each.values) for each in panel.rows] == [
        ("post", [pytest.approx(0.5)]),
        ("fit", [pytest.approx(0.4)]),
    ]


def test_nothing_is_forgotten_of_a_text_that_was_measured_on_other_documents():
    rows = [each | {"evaluation_digests": {"general": each["stage"] == "pre"}} for each in CHAIN]
    (metric,) = metrics_of(rows)
    material = of(rows)
    assert lost(material, material.rows[2], metric) is None
    assert lost(material, material.rows[3], metric) == (pytest.approx(-0.1), "post")


def test_the_best_trained_stage_of_a_column_is_darkest_and_the_untrained_one_lightest():
    material = of([*CHAIN, row("none", "pre", None)])
    (metric,) = metrics_of(material.stages)
    assert column_shades(material.stages, metric) == [0.0, 1.0, 0.0, pytest.approx(0.2), None]
    other = [each | {"evaluation_digests": {"general": each["stage"] == "pre"}} for each in CHAIN]
    assert column_shades(of(other).stages, metric) == [0.0, None, 0.0, 1.0], "pre was measured on other data"


def test_the_cost_of_a_stage_is_that_of_its_chain_and_a_recipe_has_the_mean_of_its_seeds():
    panels = {each.title: each for each in trade_offs(tiny_report.material())}
    points = {each.label: each for each in panels["task accuracy, %"].points}
    assert set(points) == {"full", "top", "scratch"}
    assert points["full"].cost == 3e9 and points["scratch"].cost == 2e9
    assert points["full"].quality == pytest.approx(sum(r["task_accuracy"] for r in tiny_report.rows()[2:5]) / 3)
    assert panels["general bits/byte"].lower_is_better


def test_a_difference_has_a_triangle_only_if_it_is_shown_beyond_chance():
    (accuracy, *_) = forest_panels(tiny_report.material(), "task")
    verdicts = {each.label: each.verdict for each in accuracy.effects}
    assert verdicts["scratch - full"] == -1 and verdicts["top - full"] == 0


def test_the_lineage_has_a_box_for_each_recipe_and_for_a_parent_elsewhere():
    nodes = {each.name: each for each in lineage(tiny_report.material())}
    assert {name: node.parent for name, node in nodes.items()} == {
        "init": "",
        "pretrain": "init",
        "full x3": "pretrain",
        "top x3": "pretrain",
        "scratch": "init",
    }
    assert nodes["scratch"].aside and not nodes["full x3"].aside
    begun = of([row("post", None, 2.0, chain={"stages": ["SmolLM2"], "tokens": 110, "flops": 5.0})])
    assert [(each.name, each.parent) for each in lineage(begun)] == [("SmolLM2", ""), ("post", "SmolLM2")]

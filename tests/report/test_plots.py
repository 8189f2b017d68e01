"""Plots: what they show, and SVG that is small, the same at every call, and safe inside a page."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm3.report.plots import svg
from llm3.report.plots.classification import plot_confusion
from llm3.report.plots.curves import Curve, Panel, merged, plot_curves, thinned
from llm3.report.plots.forest import Effect, Forest, plot_forest
from llm3.report.plots.heat_map import colour, luminance, plot_heat_map, text_colour
from llm3.report.plots.lineage import Node, places, plot_lineage
from llm3.report.plots.trade_off import Point, pareto_front

LABEL = '<script>alert("$x$")</script> href="#a" #0072b2'


def line(points, label="a"):
    return Panel("title", "x", "y", [Curve(label, points, svg.look(0))], [(0, "first"), (5, "second")])


@pytest.mark.parametrize(("panels", "sizes"), [(1, [1]), (3, [3]), (4, [2, 2]), (5, [3, 2]), (7, [3, 2, 2])])
def test_no_slot_of_a_figure_is_empty(panels, sizes):
    assert svg.row_sizes(panels, 3) == sizes
    with svg.figure(panels, 3, size=(1, 1)) as drawing:
        boxes = [axes.get_position() for axes in drawing.axes]
    rows = {round(box.y0, 6) for box in boxes}
    assert [sum(round(box.y0, 6) == row for box in boxes) for row in sorted(rows, reverse=True)] == sizes
    ends = [max(box.x1 for box in boxes if round(box.y0, 6) == row) for row in rows]
    assert max(ends) - min(ends) < 1e-9, "rows are equally wide"
    lefts = [at for at, box in enumerate(boxes) if box.x0 == min(each.x0 for each in boxes)]
    assert [at for at in range(panels) if svg.first_of_row(at, panels, 3)] == lefts


def test_a_figure_is_well_formed_with_text_as_text_and_the_same_at_every_call():
    one, two = (plot_curves([line([(0, 1), (10, 2)], LABEL)]) for _ in range(2))
    assert one == two
    root = ET.fromstring(one)
    texts = ["".join(each.itertext()) for each in root.iter("{http://www.w3.org/2000/svg}text")]
    assert svg.shortened(LABEL) in texts and {"first", "second", "x", "y"} <= set(texts)
    assert "<script" not in one and "DOCTYPE" not in one and "<metadata" not in one


def test_figures_in_one_page_share_no_id_and_have_no_colour_of_their_own():
    drawn = plot_curves([line([(0, 1), (10, 2)], LABEL)])
    one, two = (svg.for_page(drawn, name) for name in ("one", "two"))
    ids = [set(re.findall(r' id="([^"]*)"', each)) for each in (one, two)]
    assert ids[0] and not ids[0] & ids[1]
    for figure, own in zip((one, two), ids, strict=True):
        tags = " ".join(re.findall(r"<style>[^<]*|<[^>]*>", figure))
        assert set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", tags)) == own, "no id is missing or unused"
        assert not re.search("|".join(svg.PALETTE), tags)
    assert svg.BLUE in svg.for_page(plot_curves([line([(0, 1)], svg.BLUE)]), "a"), "a label stays as it is"


def test_a_style_that_is_used_often_is_written_once_and_every_element_keeps_its_own():
    often, seldom, own = "fill: none; stroke: #0072b2", "fill: #ffffff", "fill: url(#h1)"
    styles = [often, seldom, *[often] * 3, *[own] * 4]
    written = svg.with_classes(svg.ROUND + "".join(f'<path style="{each}"/>' for each in styles))
    assert written.count(often) == 1 and written.count(own) == 4
    rules = dict(re.findall(r"\.(\w+){([^}]*)}", written))
    used = re.findall(r'<path (class|style)="([^"]*)"/>', written)
    assert [rules[value] if kind == "class" else value for kind, value in used] == styles


def contrast(one, other):
    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def test_contrast_is_that_of_wcag():
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert contrast("#ffffff", "#767676") == pytest.approx(4.54, abs=0.01)


def test_text_has_a_contrast_of_four_and_a_half_and_lines_of_three_on_light_and_dark_paper():
    dark = {name: own for _, (name, own) in svg.PALETTE.items()}
    for light, (name, own) in svg.PALETTE.items():
        least = 4.5 if name in ("ink", "muted") else 3 if name not in ("paper", "grid") else 1
        assert contrast(light, svg.PAPER) >= least and contrast(own, dark["paper"]) >= least, name


@given(st.floats(-1, 1))
def test_the_text_of_a_cell_can_be_read_whatever_its_shade(shade):
    assert contrast(colour(shade), text_colour(colour(shade))) >= 4.5


def test_a_hundred_series_differ_in_more_than_their_colour():
    looks = [svg.look(index) for index in range(100)]
    assert len({str(each) for each in looks}) == 100
    for one, other in ((a, b) for a in looks for b in looks if a != b and a.colour == b.colour):
        assert (one.dashes, one.marker) != (other.dashes, other.marker)


def test_a_heat_map_shows_every_cell_with_its_text():
    drawn = plot_heat_map(["a", LABEL], ["x", "y"], [[0.0, 1.0], [None, -0.5]], [["1", "2"], ["-", "4"]])
    texts = ["".join(each.itertext()) for each in ET.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text")]
    assert sorted(texts) == sorted(["1", "2", "-", "4", "a", svg.shortened(LABEL), "x", "y"])


def test_long_histories_and_many_classes_make_small_figures():
    points = [(float(step), float(step % 7)) for step in range(100_000)]
    assert len(plot_curves([line(points)])) < 30_000
    counts = np.random.default_rng(0).integers(0, 9, (100, 100))
    assert len(plot_confusion([f"class {at}" for at in range(100)], {"a": counts})) < 60_000


@given(st.lists(st.tuples(st.floats(0, 1e9), st.floats(-1e3, 1e3)), min_size=1, max_size=400), st.integers(2, 50))
def test_thinning_keeps_the_mean_of_a_part_in_its_range_and_the_last_point(points, most):
    kept = thinned(points, most)
    assert len(kept) <= max(most, 1) and kept[-1] == points[-1]
    assert min(y for _, y in points) - 1e-6 <= min(y for _, y in kept)
    assert max(y for _, y in kept) <= max(y for _, y in points) + 1e-6


def test_hand_offs_side_by_side_have_one_label():
    assert merged([(5.0, "b"), (0.0, "a"), (5.1, "c"), (9.0, "d"), (5.1, "b")], 0.5) == [
        (0.0, "a"),
        (5.0, "b, c"),
        (9.0, "d"),
    ]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=12), st.booleans())
def test_no_point_beats_a_point_of_the_pareto_front_and_one_beats_every_other(values, lower):
    points = [Point(str(at), cost, quality) for at, (cost, quality) in enumerate(values)]
    sign = -1 if lower else 1

    def beats(one, other):
        gains = (other.cost - one.cost, sign * (one.quality - other.quality))
        return min(gains) >= 0 and max(gains) > 0

    front = pareto_front(points, lower)
    assert not any(beats(other, each) for each in front for other in points)
    shown = {(each.cost, each.quality) for each in front}
    for each in points:
        assert (each.cost, each.quality) in shown or any(beats(other, each) for other in front)


def test_a_forest_plot_names_every_comparison_and_marks_only_what_is_shown():
    effects = [
        Effect("better", 2.0, 1.0, 3.0, 1),
        Effect("worse", -2.0, -3.0, -1.0, -1),
        Effect("same", 0.0, -1.0, 1.0),
    ]
    drawn = plot_forest([Forest("accuracy", "points", effects, smallest=0.5)])
    assert all(f">{each.label}<" in drawn for each in effects)
    for shown, fill in ((effects[0], svg.GREEN), (effects[1], svg.VERMILLION)):
        assert f"fill: {fill}" in plot_forest([Forest("accuracy", "points", [shown])])
    assert f"fill: {svg.BLUE}" not in plot_forest([Forest("accuracy", "points", effects[2:])]), "hollow"


def test_children_stand_right_of_their_parent_each_in_a_row_of_its_own():
    nodes = [Node("a"), Node("b", "a"), Node("c", "a"), Node("d", "b"), Node("e", "elsewhere"), Node("f", "f")]
    found = places(nodes)
    assert {name: depth for name, (depth, _) in found.items()} == {"a": 0, "b": 1, "c": 1, "d": 2, "e": 0, "f": 0}
    assert len({(depth, row) for depth, row in found.values()}) == len(nodes)
    assert found["a"][1] == (found["b"][1] + found["c"][1]) / 2
    drawn = plot_lineage(nodes)
    assert all(f">{node.name}<" in drawn for node in nodes)

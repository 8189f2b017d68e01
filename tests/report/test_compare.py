"""Two runs side by side."""

import pytest

from llm3.report import compare
from llm3.report.material import Material
from tests.helpers import tiny_report


def run(scratch, data="d", predictions=tiny_report.predictions):
    """A run of two stages; the second one with the results of `scratch`."""

    def renamed(stage, evaluation):
        return predictions("pretrain" if stage == "pretrain" else scratch, evaluation)

    rows = [tiny_report.row("pretrain", None), tiny_report.row(scratch, "pretrain") | {"stage": "finetune"}]
    same = {"task": data, "general": "g"}
    return Material([row | {"evaluation_digests": same} for row in rows], predictions=renamed)


def cells(left, right):
    """{(stage, metric): the other cells}"""
    return {
        (line[0], metric): line[1:]
        for metric, lines in compare.tables(compare.compared(left, right)).items()
        for line in lines
    }


def test_stages_of_one_name_are_compared_item_by_item():
    found = cells(run("scratch"), run("full_0"))
    left, right, difference, p, verdict = found["finetune", "task accuracy, %"]
    assert float(right) > float(left) and verdict == "right better" and p == "< 0.0001"
    assert difference.startswith(f"+{float(right) - float(left):.1f} [")
    assert found["finetune", "task NLL, nats"][-1] == "right better", "fewer nats"
    assert found["pretrain", "general bits/byte"][2:] == ["+0.000 [+0.000, +0.000]", "1", "no difference"]


def test_metrics_on_other_data_are_shown_but_not_compared():
    found = cells(run("scratch"), run("full_0", data="other"))
    assert found["finetune", "task accuracy, %"][2:] == ["-", "-", compare.OTHER_DATA]
    assert (
        found["finetune", "general bits/byte"][-1] == "right is worse"
        or "[" in found["finetune", "general bits/byte"][2]
    )
    unknown = Material([{**row, "evaluation_digests": None} for row in run("full_0").given_rows])
    assert cells(run("scratch"), unknown)["finetune", "task accuracy, %"][-1] == compare.UNKNOWN_DATA


def test_without_predictions_bits_per_byte_have_no_test():
    bare = run("full_0", predictions=lambda stage, evaluation: None)
    assert cells(bare, bare)["pretrain", "general bits/byte"][2:] == ["+0.000", "-", compare.UNTESTED]


@pytest.mark.parametrize(
    ("left", "right", "lines"),
    [
        ({"a": 1, "b": {"c": [1]}}, {"a": 1, "b": {"c": [2]}}, ["b.c: [1] / [2]"]),
        ({"s": {"x": 1}}, {"s": {}}, ["s.x: 1 / (none)"]),
        ({}, {"s": {"x": 1}}, ["s: (none) / (section)"]),
        ({"a": None}, {"a": None}, []),
    ],
)
def test_fields_that_differ_are_named_with_both_values(left, right, lines):
    assert list(compare.field_differences(left, right)) == lines

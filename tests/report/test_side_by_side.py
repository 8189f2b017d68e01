"""The report of several runs: what is comparable, and what is not."""

import pytest

from llm3.report.material import Material
from llm3.report.side_by_side import Run, page
from tests.helpers import tiny_report


def run(name, scratch, data="d", stages=("pretrain", "finetune"), config=None):
    """A run whose fine-tuning has the results of `scratch`, measured on the data `data`."""

    def predictions(stage, evaluation):
        return tiny_report.predictions("pretrain" if stage == "pretrain" else scratch, evaluation)

    rows = {"pretrain": tiny_report.row("pretrain", None), "finetune": tiny_report.row(scratch, "pretrain")}
    same = {"task": data, "general": "g"}
    given = [rows[stage] | {"stage": stage, "evaluation_digests": same} for stage in stages]
    histories = {stage: [{"step": step, "loss": 3.0 / step} for step in (1, 2, 3)] for stage in stages}
    return Run(name, Material(given, histories=histories, predictions=predictions), config or {}, {"commit": name})


@pytest.fixture(scope="module")
def three():
    other = run("c", "full_0", data="other", stages=("finetune",), config={"seed": 1})
    return page([run("a", "scratch", config={"seed": 0}), run("b", "full_0", config={"seed": 0}), other])


def section(text, name):
    return text.partition(f"## {name}\n")[2].partition("\n## ")[0]


def test_every_run_has_a_column_and_is_compared_with_the_first(three):
    text, figures = three
    assert "| stage and metric | a | b | c |" in section(text, "All runs")
    own = section(text, "b against a").partition("**task accuracy, %**")[2]
    line = next(each for each in own.splitlines() if each.startswith("| finetune"))
    assert line.endswith("| < 0.0001 | b better |")
    assert {"differences_1.svg", "differences_2.svg", "loss.svg"} == set(figures)
    assert all(f"](figures/{name})" in text for name in figures)


def test_the_verdict_counts_what_is_better_and_what_cannot_be_compared(three):
    first, second = three[0].splitlines()[2].split("; ")
    assert first.startswith("**b is better than a beyond chance in 2 and worse in 1 of 4 metrics of stages")
    assert first.endswith("no difference is shown in 1, and 0 cannot be compared")
    assert "and worse in 1 of 3 metrics" in second and second.endswith("and 2 cannot be compared.**")


def test_what_cannot_be_compared_is_said_with_the_reason(three):
    own = section(three[0], "c against a")
    assert "- finetune, task accuracy, %: the runs measured it on other documents" in own
    assert "- Only a has pretrain." in own
    assert "Not comparable" not in section(three[0], "b against a")


def test_the_fields_that_differ_stand_below_each_other(three):
    text, _ = three
    assert "```\nseed: 0 / 1\n```" in section(text, "Config: a / c")
    assert "No difference." in section(text, "Config: a / b")
    assert "commit: 'a' / 'b'" in section(text, "Code, tokenizer and machine: a / b")

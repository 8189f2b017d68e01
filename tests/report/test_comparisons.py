"""The report compares the stages of an evaluation by their predictions."""

import numpy as np
import pytest
from scipy import stats

from llm3.report import comparisons, verdict
from llm3.report.entries import entries, interval, main_measure, measures
from llm3.report.material import Material
from llm3.report.statistics import holm, wilson
from tests.helpers import tiny_report
from tests.helpers.tiny_report import task, text


@pytest.fixture(scope="module")
def run():
    return tiny_report.material()


def compared(run, evaluation, number=0):
    """{(ours, theirs): comparison} in one metric of an evaluation."""
    measure = measures(run, evaluation)[number]
    found = comparisons.comparisons(run, entries(run, evaluation), measure)
    return {(each.ours.label, each.theirs.label): each for each in found}


def test_every_stage_of_a_task_is_compared_with_its_parent_its_siblings_and_its_baseline(run):
    assert list(compared(run, "task")) == [("top", "full"), ("scratch", "full")]
    chain = [("pretrain", "init"), ("full", "pretrain"), ("top", "pretrain"), ("scratch", "init")]
    assert list(compared(run, "general")) == [*chain, ("top", "full"), ("scratch", "full")]


def test_recipes_are_paired_by_seed(run):
    found = compared(run, "task")["top", "full"]
    accuracy = {name: [task(f"{name}_{seed}")["score"].mean() for seed in range(3)] for name in ("full", "top")}
    assert found.difference.p == pytest.approx(stats.ttest_rel(accuracy["top"], accuracy["full"]).pvalue)
    assert found.paired_over == "3 seeds" and found.verdict == "no difference shown"


def test_a_recipe_is_compared_with_a_stage_over_its_seeds(run):
    found = compared(run, "task")["scratch", "full"]
    differences = [task("scratch")["score"].mean() - task(f"full_{seed}")["score"].mean() for seed in range(3)]
    assert found.difference.p == pytest.approx(stats.ttest_1samp(differences, 0).pvalue)
    assert found.paired_over == "3 seeds" and found.verdict == "worse"
    assert compared(run, "task", 1)["scratch", "full"].verdict == "worse", "more nats"


def test_two_stages_are_compared_by_mcnemars_test_on_the_items_that_only_one_got_right():
    single = tiny_report.single()
    found = compared(single, "task")["scratch", "full_0"]
    ours, theirs = task("scratch")["score"], task("full_0")["score"]
    lost, won = int(np.sum(ours < theirs)), int(np.sum(ours > theirs))
    assert found.difference.test == "exact McNemar"
    assert found.difference.p == pytest.approx(stats.binomtest(won, won + lost).pvalue)
    nll = compared(single, "task", 1)["scratch", "full_0"]
    assert nll.difference.p == pytest.approx(stats.ttest_rel(task("scratch")["nats"], task("full_0")["nats"]).pvalue)
    assert nll.paired_over == "120 items" and nll.verdict == "worse", "more nats"
    (task_entry, _) = entries(single, "task")
    assert interval(task_entry, main_measure(single, "task")) == wilson(theirs.sum(), 120)


def test_bits_per_byte_are_compared_document_by_document(run):
    found = compared(run, "general")["pretrain", "init"]
    before, after = text("init"), text("pretrain")
    expected = (after["nats"] - before["nats"]).sum() / np.log(2) / before["bytes"].sum()
    assert found.difference.value == pytest.approx(expected)
    assert found.verdict == "better" and found.paired_over == "30 items"


def test_p_values_are_corrected_for_all_tests_of_a_table(run):
    found = list(compared(run, "general").values())
    assert [each.p for each in found] == holm([each.difference.p for each in found])


def test_documents_in_another_order_are_paired_by_their_item():
    def shuffled(stage, evaluation):
        columns = tiny_report.predictions(stage, evaluation)
        if stage != "scratch" or columns is None:
            return columns
        order = np.random.default_rng(0).permutation(len(columns["item"]))
        return {name: each if name == "classes" else each[order] for name, each in columns.items()}

    for evaluation in ("task", "general"):
        found, expected = (
            compared(tiny_report.single(each), evaluation) for each in (shuffled, tiny_report.predictions)
        )
        assert [each.difference[:4] for each in found.values()] == [
            pytest.approx(each.difference[:4]) for each in expected.values()
        ]


def test_stages_with_predictions_of_other_documents_are_not_compared():
    def moved(stage, evaluation):
        columns = tiny_report.predictions(stage, evaluation)
        return columns | {"item": columns["item"] + 1} if stage == "scratch" else columns

    assert ("scratch", "full_0") in compared(tiny_report.single(), "task")
    assert ("scratch", "full_0") not in compared(tiny_report.single(moved), "task")


def test_predictions_that_do_not_make_up_the_metric_of_the_row_are_not_used():
    wrong = tiny_report.single(task_accuracy=0.25)
    assert compared(wrong, "task")["scratch", "full_0"].difference.test == "unpaired z"


def test_without_predictions_two_accuracies_are_compared_by_their_standard_errors():
    bare = Material([tiny_report.row("full_0", "pretrain")], [tiny_report.row("scratch", "init")])
    found = compared(bare, "task")["scratch", "full_0"]
    assert found.difference.test == "unpaired z" and found.verdict == "worse"
    assert "Predictions by item were not kept of full_0, scratch" in "\n".join(comparisons.section(bare))


def test_stages_that_were_measured_on_other_data_are_not_tested():
    rows = [tiny_report.row(name, parent) for name, parent in (("full_0", "pretrain"), ("scratch", "init"))]
    for digests, expected in ((("a", "a"), 1), (("a", "b"), 0)):
        ours, theirs = (
            row | {"evaluation_digests": {"task": digest}} for row, digest in zip(rows, digests, strict=True)
        )
        assert len(compared(Material([ours], [theirs], predictions=tiny_report.predictions), "task")) == expected


def test_the_table_of_stages_has_all_metrics_of_a_classification(run):
    text = "\n".join(comparisons.section(run))
    assert "| stage | seeds | accuracy, % | NLL, nats | macro F1, % |" in text
    assert "120 items; the most frequent class alone has 33.3 %." in text
    line = next(line for line in text.splitlines() if line.startswith("| *scratch* |"))
    found = wilson(task("scratch")["score"].sum(), 120)
    assert f"{100 * found.value:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]" in line


def test_the_first_sentence_says_which_stage_is_best_and_which_differences_are_shown(run):
    (sentence,) = verdict.section(run)
    assert sentence.startswith("**task: full has the highest accuracy, ")
    assert "better than scratch beyond chance, but no difference from top is shown" in sentence
    assert "general text costs 8.0" in sentence


@pytest.mark.parametrize(
    ("metrics", "columns"),
    [
        ({"hidden_accuracy": 0.5, "hidden_nll": 2.0}, {"correct": [1, 3], "tokens": [4, 4], "nats": [10.0, 6.0]}),
        ({"hidden_exact_match": 0.5, "hidden_f1": 0.75}, {"score": [1.0, 0.0], "f1": [1.0, 0.5]}),
        ({"hidden_pseudo_bits_per_byte": 2.0}, {"nats": np.log(2) * np.array([10.0, 30.0]), "bytes": [10, 10]}),
    ],
)
def test_metrics_of_tokens_and_of_answers_are_made_of_their_own_columns(metrics, columns):
    kept = {"item": np.arange(2)} | {name: np.array(values) for name, values in columns.items()}
    made = Material([{"stage": "a", **metrics}], predictions=lambda stage, evaluation: kept)
    (entry,) = entries(made, "hidden")
    found = {each.key: interval(entry, each) for each in measures(made, "hidden")}
    assert {key: each.value for key, each in found.items()} == pytest.approx(metrics)

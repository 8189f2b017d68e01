"""The comparisons of an ablation, of rows made by hand: what is paired, what is missing, and what is said of it."""

import numpy as np
import pytest
from scipy import stats

from llm3.ablation.analysis import Analysis, distinct
from llm3.ablation.metrics import measure_of_key
from llm3.ablation.power import over_seeds, power
from llm3.ablation.sections.comparisons import detectable
from llm3.ablation.sections.opening import headline, sentences
from llm3.ablation.statistics import over_documents
from llm3.report.predictions import write_predictions
from tests.helpers.tiny_study import BETTER, ITEMS, OLD, comparison, row, study

SAME = [0.51, 0.52, 0.50, 0.51, 0.50]


def analysis(path, **more):
    return Analysis(study(path, **more))


def test_a_planted_effect_is_confirmed_and_its_opposite_refuted(tmp_path):
    found = analysis(
        tmp_path,
        value={"old": OLD, "new": BETTER},
        comparisons={"up": comparison(expect="better"), "down": comparison(expect="worse")},
    )
    assert [each.word for each in found.results] == ["confirmed", "refuted"]
    assert headline(found) == "Of 2 comparisons, 1 is confirmed (up) and 1 is refuted (down)."


def test_a_null_result_is_said_like_the_others(tmp_path):
    found = analysis(
        tmp_path,
        value={"old": OLD, "new": SAME, "best": BETTER},
        arms=("old", "new", "best"),
        comparisons={"a": comparison(expect="better"), "b": comparison("best", "old", expect="better")},
    )
    assert headline(found) == "Of 2 comparisons, 1 is confirmed (b) and 1 is undecided (a)."
    null, shown = sentences(found.results)
    assert null.startswith("a: Undecided: no difference between new and old in task accuracy is shown (-0.2 points")
    assert shown.startswith("b: Confirmed: best is better than old in task accuracy (+10.2 points")


def test_p_values_are_those_of_the_paired_t_test_adjusted_by_holm_for_all_comparisons(tmp_path):
    values = {"old": OLD, "new": SAME, "best": BETTER}
    found = analysis(tmp_path, value=values, arms=("old", "new", "best"))
    p = {each.pair.ours.arm: each.verdict.p for each in found.results}
    raw = {arm: stats.ttest_rel(values[arm], OLD).pvalue for arm in ("new", "best")}
    assert p["best"] == pytest.approx(2 * raw["best"])
    assert p["new"] == pytest.approx(raw["new"])


def test_without_declared_comparisons_every_arm_is_held_against_the_reference_and_nothing_is_expected(tmp_path):
    values = {"old": OLD, "new": SAME, "best": BETTER}
    found = analysis(tmp_path, value=values, arms=("old", "new", "best"), reference="new")
    assert [each.pair.name for each in found.results] == ["old against new", "best against new"]
    assert headline(found) == (
        "best is better than new in task accuracy; no difference between new and old is shown in task accuracy."
    )
    assert not any("confirmed" in each.lower() for each in sentences(found.results))


def test_seeds_that_one_arm_lacks_are_left_out_of_the_pairs_and_named(tmp_path):
    (found,) = analysis(tmp_path, value={"old": OLD, "new": [*BETTER[:3], None, BETTER[4]]}).results
    assert found.seeds == [0, 1, 2, 4]
    assert found.missing == {"new": [3]}
    assert found.effect.value == pytest.approx(np.mean([b - a for a, b in zip(OLD, BETTER, strict=True) if a != 0.52]))
    assert next(sentences([found])).endswith("new lacks seed 3.")


def test_an_arm_without_results_is_not_compared_and_named(tmp_path):
    found = analysis(
        tmp_path,
        value={"old": OLD, "new": [None] * 5, "best": BETTER},
        arms=("old", "new", "best"),
        comparisons={"a": comparison(expect="better"), "b": comparison("best", "old", expect="better")},
    )
    assert headline(found) == "Of 2 comparisons, 1 is confirmed (b) and 1 is not compared (a)."
    assert next(sentences(found.results)).startswith("a: not compared, since no seed of new is finished.")


def test_arms_without_a_common_seed_are_not_compared(tmp_path):
    (found,) = analysis(tmp_path, seeds=2, value={"old": [0.5, None], "new": [None, 0.6]}).results
    assert found.reason == "they have no finished seed in common"


def test_arms_that_were_evaluated_on_other_data_are_not_compared(tmp_path):
    own = study(tmp_path, {"old": OLD, "new": BETTER})
    for each in own.outcomes:
        each.row["evaluation_digests"] = {"task": each.variant}
    (found,) = Analysis(own).results
    assert found.reason == "they were evaluated on other data, or in another way"
    assert found.effect is None


def test_a_row_without_the_metric_is_named(tmp_path):
    (found,) = analysis(tmp_path, value={"old": OLD, "new": BETTER}, metric="task_macro_f1").results
    assert found.reason == "new has no task_macro_f1"


def test_one_seed_decides_nothing(tmp_path):
    (found,) = analysis(tmp_path, seeds=1, value={"old": [0.2], "new": [0.9]}, items=True).results
    assert found.word == "undecided"
    assert found.effect.items == ITEMS


def test_differences_are_paired_by_item_only_where_both_arms_kept_the_same_items(tmp_path):
    own = study(tmp_path, {"old": OLD, "new": BETTER}, items=True)
    (found,) = Analysis(own).results
    assert (found.effect.items, found.effect.covers) == (ITEMS, "new seeds and new items")
    folder = own.of("new")[0].folders["finetune"]
    columns = dict(own.of("new")[0].predictions("task"))
    write_predictions(folder, "task", columns | {"item": columns["item"] + 1})
    (found,) = Analysis(own).results
    assert (found.effect.items, found.effect.covers) == (0, "new seeds")


def test_items_that_do_not_make_up_the_metric_are_not_used(tmp_path):
    own = study(tmp_path, {"old": OLD, "new": BETTER}, items=True)
    own.of("new")[2].row["task_accuracy"] = 0.9
    (found,) = Analysis(own).results
    assert found.effect.items == 0


def test_bits_per_byte_have_an_interval_over_documents_too_and_lower_is_better(tmp_path):
    own = study(tmp_path, {"old": OLD, "new": OLD}, comparisons={"a": comparison(expect="better")})
    random, sums, weights = np.random.default_rng(0), {}, np.arange(20) + 50
    for each in own.outcomes:
        bits = weights * (2 - 0.1 * (each.variant == "new")) + random.normal(0, 0.5, 20) + each.seed
        write_predictions(
            each.folders["finetune"], "general", {"item": np.arange(20), "nats": bits * np.log(2), "bytes": weights}
        )
        each.row["general_bits_per_byte"] = bits.sum() / weights.sum()
        sums.setdefault(each.variant, {})[each.seed] = bits
    (table,) = Analysis(own).secondary.items()
    measure, ((found, p),) = table
    assert measure.key == "general_bits_per_byte" and measure.lower_is_better
    assert found.documents == pytest.approx(over_documents(sums["new"], sums["old"], np.arange(20), weights))
    assert found.effect.value < 0 and p < 0.05


def test_the_direction_of_a_metric_decides_what_is_better(tmp_path):
    rows = [row("finetune", 0, 0.5, 1000) | {"evaluations": {"task": {}, "task_b": {}}}]
    lower = {key: measure_of_key(key, rows).lower_is_better for key in ("task_accuracy", "task_nll", "task_b_ece")}
    assert lower == {"task_accuracy": False, "task_nll": True, "task_b_ece": True}
    assert measure_of_key("task_b_ece", rows).name == "ece"
    assert measure_of_key("general_bits_per_byte", rows).lower_is_better


def test_every_cell_of_a_grid_is_compared_and_all_cells_are_one_family(tmp_path):
    gain = {"1": 0.0, "2": 0.1, "3": 0.1}

    def value(arm, cell, seed):
        return OLD[seed] + (arm == "new") * (gain[cell["x"]] + 0.02 * SAME[seed])

    found = analysis(tmp_path, value=value, grid={"x": ["1", "2", "3"]})
    assert [each.pair.title for each in found.results] == [f"new against old, x={x}" for x in "123"]
    raw = stats.ttest_rel([value("new", {"x": "2"}, s) for s in range(5)], OLD).pvalue
    assert found.results[1].verdict.p == pytest.approx(3 * raw, rel=1e-6)
    assert headline(found).startswith("In task accuracy, new against old is better in")


def test_many_declared_comparisons_are_counted_over_all_cells_in_one_sentence(tmp_path):
    found = analysis(
        tmp_path,
        value=lambda arm, cell, seed: OLD[seed] + (arm == "new" and cell["x"] == "2") * (0.1 + 0.02 * SAME[seed]),
        grid={"x": ["1", "2"]},
        comparisons={f"c{i}": comparison(expect="better") for i in range(5)},
    )
    half = ", ".join(f"c{i} in 1 of 2 cells" for i in range(5))
    assert headline(found) == f"Of 10 comparisons, 5 are confirmed ({half}) and 5 are undecided ({half})."


def test_the_points_of_a_single_arm_are_compared_with_the_first_one(tmp_path):
    found = analysis(
        tmp_path,
        value=lambda arm, cell, seed: {"1": OLD, "2": BETTER, "3": SAME}[cell["rate"]][seed],
        arms=("base",),
        arm_configs={},
        grid={"rate": ["1", "2", "3"]},
    )
    assert [each.pair.title for each in found.results] == ["against rate=1, rate=2", "against rate=1, rate=3"]
    assert headline(found) == (
        "In task accuracy, rate=2 has the best mean, 61.2 %; of 2 points against rate=1, 1 is better and 1 is not "
        "shown to differ."
    )
    assert next(sentences(found.results)).startswith("rate=2 is better than rate=1 in task accuracy (+10.2 points")


def test_seeds_at_which_all_stage_runs_are_the_same_count_once(tmp_path):
    own = study(tmp_path, {"old": [0.5] * 5, "new": BETTER})
    old, new = own.variants
    same = old._replace(chains=dict.fromkeys(old.chains, old.chains["0"]))
    assert distinct([same], range(5)) == [0]
    assert distinct([same, new], range(5)) == [0, 1, 2, 3, 4]


def test_the_deviation_for_80_percent_is_where_the_power_is_80_percent():
    deviation = detectable(0.02, 5, 0.05 / 3)
    assert power(0.02, over_seeds(deviation), 5, alpha=0.05 / 3) == pytest.approx(0.8, abs=1e-4)
    assert detectable(0.0, 5, 0.05) is None
    assert detectable(0.02, 1, 0.05) is None


@pytest.mark.parametrize(
    ("new", "smallest", "word", "says"),
    [
        (BETTER, 0.0, "confirmed", "new is better than old"),
        (BETTER, 0.2, "refuted", "but by less than the 20.0 points that counts"),
        (SAME, 0.1, "refuted", "new and old differ in task accuracy by less than the 10.0 points that counts"),
        (SAME, 0.001, "undecided", "no difference"),
    ],
)
def test_without_a_direction_a_comparison_is_refuted_by_a_difference_shown_to_be_too_small(
    tmp_path, new, smallest, word, says
):
    declared = {"a": comparison(expect="different", smallest=smallest)}
    (found,) = analysis(tmp_path, value={"old": OLD, "new": new}, comparisons=declared).results
    assert found.word == word
    assert says in found.verdict.sentence


def test_the_rows_of_another_stage_can_be_compared(tmp_path):
    declared = {"a": comparison(metric="general_bits_per_byte", stage="pretrain", expect="worse"), "b": comparison()}
    own = study(tmp_path, {"old": OLD, "new": OLD}, comparisons=declared)
    for number, variant in enumerate(own.variants):  # otherwise arms share their first stage
        variant.chains.update({seed: [f"{chain[0]}-{number}", chain[1]] for seed, chain in variant.chains.items()})
    for each in own.of("new"):
        each.rows["pretrain"]["general_bits_per_byte"] += 0.1 + 0.01 * each.seed
    first, second = Analysis(own).results
    assert (first.word, first.metric) == ("confirmed", "general bits/byte after pretrain")
    assert first.effect.value == pytest.approx(0.12)
    assert second.metric == "task accuracy"


def test_a_stage_that_the_seed_does_not_change_has_one_result(tmp_path):
    declared = {"a": comparison(metric="general_bits_per_byte", stage="pretrain")}
    own = study(tmp_path, {"old": OLD, "new": OLD}, comparisons=declared)
    for variant in own.variants:
        variant.chains.update({seed: ["pretrain-0", chain[1]] for seed, chain in variant.chains.items()})
    (found,) = Analysis(own).results
    assert found.seeds == [0]


def test_cells_whose_arms_are_the_same_stage_runs_are_one_test(tmp_path):
    values = {"old": OLD, "new": BETTER}
    own = study(tmp_path, lambda arm, cell, seed: values[arm][seed], grid={"shared by": ["1", "3"]})
    p = Analysis(own).results[0].verdict.p
    for variant in own.variants[1::2]:
        variant.chains.update(own.variants[own.variants.index(variant) - 1].chains)
    found = Analysis(own)
    assert (found.tests, [each.verdict.p for each in found.results]) == (1, pytest.approx([p / 2, p / 2]))


def test_two_arms_are_in_a_table_of_another_metric_once(tmp_path):
    declared = {"a": comparison(expect="better"), "b": comparison(expect="no worse", smallest=0.1)}
    ((_, (only,)),) = analysis(tmp_path, value={"old": OLD, "new": SAME}, comparisons=declared).secondary.items()
    assert only.result.pair.title == "new against old"

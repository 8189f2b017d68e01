"""Intervals and tests, compared with scipy and scikit-learn."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import brier_score_loss, f1_score

from llm3.report import statistics

RANDOM = np.random.default_rng(0)
OURS, THEIRS = ((RANDOM.random(200) < share).astype(float) for share in (0.7, 0.6))
NATS, OTHER_NATS, BYTES = RANDOM.gamma(2, 100, 80), RANDOM.gamma(2, 110, 80), RANDOM.integers(100, 900, 80)


@pytest.mark.parametrize(("hits", "items"), [(0, 5), (5, 5), (71, 100), (1, 815)])
def test_the_interval_of_a_share_is_wilsons(hits, items):
    expected = stats.binomtest(hits, items).proportion_ci(0.95, "wilson")
    assert statistics.wilson(hits, items)[1:] == pytest.approx((expected.low, expected.high))
    with pytest.raises(ValueError, match="0 items"):
        statistics.wilson(0, 0)


def test_the_interval_of_a_ratio_is_that_of_the_bootstrap():
    found = statistics.ratio(NATS, BYTES)
    data, ratio = (NATS, BYTES), (lambda nats, count, axis: nats.sum(axis) / count.sum(axis))
    expected = stats.bootstrap(data, ratio, paired=True, method="percentile", rng=1).confidence_interval
    assert found.value == pytest.approx(NATS.sum() / BYTES.sum())
    assert found[1:] == pytest.approx((expected.low, expected.high), rel=0.02)
    assert statistics.ratio(NATS, BYTES) == found, "the same at every call"


def test_many_items_are_resampled_in_parts(monkeypatch):
    monkeypatch.setattr(statistics, "DRAWS", 80 * 1000)
    parts = statistics.resampled_sums(np.ones((80, 1)))
    assert parts.shape == (1000, 1) and set(parts.flat) == {80.0}


def test_macro_f1_is_that_of_scikit_learn_and_its_interval_that_of_the_bootstrap():
    truth = RANDOM.choice(["a", "b", "c"], 150, p=[0.6, 0.3, 0.1])
    prediction = np.where(RANDOM.random(150) < 0.7, truth, RANDOM.choice(["a", "b", "d"], 150))
    found = statistics.macro_f1(truth, prediction)
    assert found.value == pytest.approx(f1_score(truth, prediction, average="macro"))
    drawn = [RANDOM.integers(150, size=150) for _ in range(500)]
    scores = [f1_score(truth[each], prediction[each], average="macro") for each in drawn]
    assert found[1:] == pytest.approx(np.quantile(scores, [0.025, 0.975]), abs=0.02)


def test_means_are_compared_by_the_paired_t_test():
    found, expected = statistics.paired(NATS, OTHER_NATS), stats.ttest_rel(NATS, OTHER_NATS)
    interval = expected.confidence_interval()
    assert found[:4] == pytest.approx(((NATS - OTHER_NATS).mean(), interval.low, interval.high, expected.pvalue))
    assert found[4:] == (80, "paired t", "items")


def test_ratios_are_compared_on_the_same_items_as_the_bootstrap_compares_them():
    found = statistics.paired(NATS, OTHER_NATS, BYTES)
    assert found.value == pytest.approx(NATS.sum() / BYTES.sum() - OTHER_NATS.sum() / BYTES.sum())
    data, difference = (NATS, OTHER_NATS, BYTES), (lambda a, b, count, axis: (a - b).sum(axis) / count.sum(axis))
    expected = stats.bootstrap(data, difference, paired=True, method="percentile", rng=1).confidence_interval
    assert found[1:3] == pytest.approx((expected.low, expected.high), abs=0.02 * (expected.high - expected.low) + 0.01)


def test_right_and_wrong_answers_are_compared_by_mcnemars_exact_test():
    found = statistics.paired(OURS, THEIRS)
    only_ours, only_theirs = int(np.sum(OURS > THEIRS)), int(np.sum(OURS < THEIRS))
    assert found.p == pytest.approx(stats.binomtest(only_ours, only_ours + only_theirs).pvalue)
    assert found.test == "exact McNemar"
    assert found.value == pytest.approx((only_ours - only_theirs) / 200)


def test_equal_scores_show_no_difference():
    assert statistics.paired(OURS, OURS)[:4] == (0, 0, 0, 1)
    assert statistics.over_seeds([0.0, 0.0])[3:] == (1, 2, "t over seeds", "seeds")
    assert statistics.paired(NATS[:1], NATS[:1]) is None
    assert statistics.over_seeds([0.5]) is None


def test_equal_differences_are_tested_by_their_signs_and_are_not_certain():
    """A t test has no spread to go by, and would find p = 0, also with two seeds."""
    for number in (2, 3, 9):
        by_sign = stats.binomtest(number, number).pvalue
        assert statistics.paired(NATS[:number], NATS[:number] - 1)[3:] == (by_sign, number, "sign test", "items")
        ratios = statistics.paired(2.0 * BYTES[:number], 1.5 * BYTES[:number], BYTES[:number])
        assert ratios[:4] == (0.5, 0.5, 0.5, by_sign) and ratios.test == "sign test"
        assert statistics.over_seeds([-0.5] * number)[3:] == (by_sign, number, "sign test", "seeds")


def test_seeds_are_compared_by_the_t_test_over_their_differences():
    values = [0.02, 0.05, 0.01]
    found, expected = statistics.over_seeds(values), stats.ttest_1samp(values, 0)
    interval = expected.confidence_interval()
    assert found[:4] == pytest.approx((np.mean(values), interval.low, interval.high, expected.pvalue))


def test_independent_estimates_are_compared_by_their_standard_errors():
    found = statistics.unpaired(0.7, 0.6, 0.03, 0.04, 100)
    assert found[:4] == pytest.approx((0.1, 0.1 - 1.96 * 0.05, 0.1 + 1.96 * 0.05, 2 * stats.norm.sf(2)), abs=1e-4)


def test_p_values_are_corrected_as_holm_did():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.9, 0.8]) == [1, 1]
    assert statistics.holm([]) == []


def test_bins_of_confidence_give_the_expected_calibration_error():
    confidence, right = np.array([0.95, 0.97, 0.5, 0.52, 1.0]), np.array([1.0, 0, 1, 0, 1])
    bins = statistics.reliability(confidence, right)
    assert [each.items for each in bins] == [2, 3]
    assert statistics.calibration_error(bins) == pytest.approx((2 * abs(0.5 - 0.51) + abs(2 - 2.92)) / 5)


def test_the_brier_score_of_two_classes_is_twice_that_of_scikit_learn():
    probability, truth = RANDOM.random(50), RANDOM.integers(2, size=50)
    found = statistics.brier(np.stack([1 - probability, probability], axis=1), truth)
    assert found.mean() == pytest.approx(2 * brier_score_loss(truth, probability))

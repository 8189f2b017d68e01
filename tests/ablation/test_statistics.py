"""The difference of two arms, compared with scipy, with mean squares and with matrices."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from llm3.ablation.statistics import effect, interval, over_documents
from llm3.ablation.variance import Variance, bell_mccaffrey

RANDOM = np.random.default_rng(0)
SEEDS, ITEMS = 5, 60
OURS, THEIRS = ({seed: table[seed] for seed in range(SEEDS)} for table in RANDOM.gamma(2, 1, (2, SEEDS, ITEMS)))
BYTES = RANDOM.integers(2, 30, ITEMS).astype(float)
DOCUMENTS = np.repeat(np.arange(12), 5)


def means(scores, weights=None):
    return {seed: row.sum() / (ITEMS if weights is None else weights.sum()) for seed, row in scores.items()}


def only(scores, *seeds):
    return {seed: scores[seed] for seed in seeds}


OUR_MEANS, THEIR_MEANS = means(OURS), means(THEIRS)


def test_arms_paired_by_seed_are_compared_by_the_paired_t_test():
    found = effect(OUR_MEANS, THEIR_MEANS)
    expected = stats.ttest_rel(list(OUR_MEANS.values()), list(THEIR_MEANS.values()))
    assert (found.p, found.low, found.high) == pytest.approx((expected.pvalue, *expected.confidence_interval()))
    assert found.interval(0.99) == pytest.approx(tuple(expected.confidence_interval(0.99)))
    assert found.differences == pytest.approx({seed: OUR_MEANS[seed] - THEIR_MEANS[seed] for seed in range(SEEDS)})
    assert (found.test, found.covers, found.variance.seed_df) == ("paired t over seeds", "new seeds", SEEDS - 1)


def test_the_p_value_of_another_null_is_that_of_shifted_values():
    shifted = effect({seed: value - 0.1 for seed, value in OUR_MEANS.items()}, THEIR_MEANS)
    assert effect(OUR_MEANS, THEIR_MEANS).p_value(0.1) == pytest.approx(shifted.p)


def test_seeds_are_paired_by_number_not_by_order_and_those_of_one_arm_alone_are_left_out():
    reordered = dict(reversed(THEIR_MEANS.items())) | {9: 100.0}
    assert effect(OUR_MEANS, reordered) == effect(OUR_MEANS, THEIR_MEANS)


@pytest.mark.parametrize(("first", "paired"), [(10, True), (SEEDS - 1, True), (0, False)])
def test_arms_with_at_most_one_seed_in_common_and_unpaired_ones_are_compared_by_welchs_test(first, paired):
    theirs = {seed + first: THEIR_MEANS[seed] for seed in range(3)}
    found = effect(OUR_MEANS, theirs, paired=paired)
    expected = stats.ttest_ind(list(OUR_MEANS.values()), list(theirs.values()), equal_var=False)
    assert (found.p, found.low, found.high) == pytest.approx((expected.pvalue, *expected.confidence_interval()))
    assert (found.test, found.seeds, found.differences) == ("Welch's t over unpaired seeds", 3, {})


def test_one_seed_is_compared_over_its_items_alone_and_says_so():
    found = effect(only(OUR_MEANS, 1), only(THEIR_MEANS, 1), OURS, THEIRS)
    expected = stats.ttest_rel(OURS[1], THEIRS[1])
    assert (found.p, found.low, found.high) == pytest.approx((expected.pvalue, *expected.confidence_interval()))
    assert (found.test, found.covers) == ("t over items (one seed)", "new items")


def test_one_seed_of_right_and_wrong_answers_has_the_p_value_of_mcnemar():
    ours, theirs = ({0: (RANDOM.random(ITEMS) < share).astype(float)} for share in (0.7, 0.5))
    found = effect(means(ours), means(theirs), ours, theirs)
    won = int(np.sum(ours[0] > theirs[0]))
    assert found.p == pytest.approx(stats.binomtest(won, won + int(np.sum(ours[0] < theirs[0]))).pvalue)
    assert found.test == "exact McNemar over items (one seed)"


def test_mcnemars_test_is_for_independent_items_only():
    ours, theirs = {0: np.tile([1.0, 0.0], ITEMS // 2)}, {0: np.tile([0.0, 0.0, 1.0, 0.0], ITEMS // 4)}
    assert effect(means(ours), means(theirs), ours, theirs, np.arange(ITEMS) // 2).test == "t over items (one seed)"


def test_one_seed_without_items_has_no_test():
    found = effect({0: 0.7}, {0: 0.6})
    assert (found.value, found.low, found.high, found.p) == (pytest.approx(0.1), -math.inf, math.inf, 1.0)
    assert (found.test, found.covers) == ("none (one seed)", "these seeds only")


def test_items_of_a_document_are_one_observation():
    found = effect(only(OUR_MEANS, 0), only(THEIR_MEANS, 0), OURS, THEIRS, DOCUMENTS)
    of_documents = (OURS[0] - THEIRS[0]).reshape(12, 5).mean(axis=1)
    assert found.p == pytest.approx(stats.ttest_1samp(of_documents, 0).pvalue)
    assert (found.items, found.documents, found.variance.item_df) == (60, 12, pytest.approx(11))


@pytest.mark.parametrize("documents", [None, DOCUMENTS])
def test_the_parts_of_the_variance_are_the_mean_squares_of_seeds_items_and_both(documents):
    found = effect(OUR_MEANS, THEIR_MEANS, OURS, THEIRS, documents)
    cells = np.stack([OURS[seed] - THEIRS[seed] for seed in range(SEEDS)])
    if documents is not None:
        cells = cells.reshape(SEEDS, 12, 5).mean(axis=2)
    seeds, items = cells.shape
    of_seeds, of_items = cells.mean(axis=1), cells.mean(axis=0)
    rest = sum(
        (cells[s, i] - of_seeds[s] - of_items[i] + cells.mean()) ** 2 for s in range(seeds) for i in range(items)
    )
    variance = found.variance
    assert variance.seed == pytest.approx(np.var(of_seeds, ddof=1) / seeds)
    assert variance.item == pytest.approx(np.var(of_items, ddof=1) / items)
    assert variance.shared == pytest.approx(rest / (seeds - 1) / (items - 1) / (seeds * items))
    assert (variance.seed_df, variance.item_df) == pytest.approx((seeds - 1, items - 1))
    assert found.covers == "new seeds and new items"


def test_the_interval_over_seeds_and_items_is_banerjees_less_what_both_count():
    variance = Variance(seed=4.0, seed_df=4, item=9.0, item_df=99, shared=1.0)
    t, z = stats.t.ppf(0.995, [4, 99]), stats.norm.ppf(0.995)
    assert variance.half_width(0.01) == pytest.approx(math.sqrt(t[0] ** 2 * 4 + t[1] ** 2 * 9 - z**2))
    assert Variance(4.0, 4, 0.5, 99, 1.0).half_width(0.01) == pytest.approx(2 * t[0]), "no negative part of items"


def test_unpaired_arms_on_the_same_items_have_the_seed_parts_of_both():
    theirs = {seed + 10: row for seed, row in THEIRS.items()}
    found = effect(OUR_MEANS, means(theirs), OURS, theirs)
    parts = [np.var(list(each.values()), ddof=1) / SEEDS for each in (OUR_MEANS, THEIR_MEANS)]
    of_items = np.mean(list(OURS.values()), axis=0) - np.mean(list(THEIRS.values()), axis=0)
    assert found.variance.seed == pytest.approx(sum(parts))
    assert found.variance.item == pytest.approx(np.var(of_items, ddof=1) / ITEMS)
    assert found.test == "Welch's t over unpaired seeds and items (Banerjee)"


def test_ratios_have_nearly_the_interval_of_the_bootstrap_over_documents():
    documents = np.repeat(np.arange(30), 2)
    arms = only(means(OURS, BYTES), 0), only(means(THEIRS, BYTES), 0)
    found = effect(*arms, OURS, THEIRS, documents, BYTES)
    resampled = over_documents(only(OURS, 0), only(THEIRS, 0), documents, BYTES)
    assert found.value == pytest.approx(resampled.value)
    assert found.high - found.low == pytest.approx(resampled.high - resampled.low, rel=0.15)
    columns = [np.bincount(documents, each) for each in (OURS[0], THEIRS[0], BYTES)]
    expected = stats.bootstrap(
        columns, lambda ours, theirs, size, axis: (ours - theirs).sum(axis) / size.sum(axis), paired=True,
        method="percentile", rng=1, n_resamples=2000,
    ).confidence_interval  # fmt: skip
    assert resampled[1:] == pytest.approx((expected.low, expected.high), abs=0.1 * (expected.high - expected.low))


@settings(max_examples=30)
@given(st.lists(st.floats(0.05, 1), min_size=2, max_size=8))
def test_documents_of_unequal_size_are_corrected_as_by_bell_and_mccaffrey(sizes):
    shares = np.array(sizes) / sum(sizes)
    residuals = np.eye(len(shares)) - np.outer(shares, np.ones(len(shares)))
    spread = residuals @ np.diag(shares**2) @ residuals.T
    expected = shares @ shares / np.trace(spread), np.trace(spread) ** 2 / np.trace(spread @ spread)
    assert bell_mccaffrey(shares) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("seeds", "p"), [(2, 0.5), (5, 0.0625), (8, 2**-7)])
def test_equal_differences_have_the_p_value_of_sign_flips_not_zero(seeds, p):
    found = effect(
        {seed: 0.7 + 0.01 * seed for seed in range(seeds)}, {seed: 0.6 + 0.01 * seed for seed in range(seeds)}
    )
    assert found.p == p
    wide = (-math.inf, math.inf) if p > 0.05 else pytest.approx((found.value, found.value))
    assert (found.low, found.high) == wide, "the interval agrees with the p-value"


def test_equal_arms_differ_by_nothing():
    found = effect(OUR_MEANS, OUR_MEANS, OURS, OURS)
    assert (found.value, found.p) == (0.0, 1.0)


@settings(max_examples=50)
@given(
    st.integers(2, 8), st.integers(2, 300), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0.01, 4),
    st.floats(1e-4, 0.5),
)  # fmt: skip
def test_a_difference_is_shown_exactly_if_the_interval_at_that_level_excludes_it(
    seeds, documents, of_seed, of_item, shared, value, alpha
):
    base = effect({seed: float(seed) for seed in range(seeds)}, dict.fromkeys(range(seeds), 0.0))
    variance = Variance(of_seed + shared + 1e-3, seeds - 1, of_item + shared, documents - 1, shared)
    found = base._replace(value=value, variance=variance)
    low, _ = found.interval(1 - alpha)
    p = found.p_value()
    assert (p < alpha) == (low > 0) or p == pytest.approx(alpha)
    assert found.p_value(low) == pytest.approx(alpha, rel=1e-6)


def test_arms_swapped_give_the_same_with_the_other_sign():
    found, other = effect(OUR_MEANS, THEIR_MEANS, OURS, THEIRS), effect(THEIR_MEANS, OUR_MEANS, THEIRS, OURS)
    assert (other.value, other.low, other.high) == pytest.approx((-found.value, -found.high, -found.low))
    assert other.p == pytest.approx(found.p)


def test_one_document_says_nothing_about_new_items():
    assert effect(OUR_MEANS, THEIR_MEANS, OURS, THEIRS, np.zeros(ITEMS)).covers == "new seeds"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({}, {0: 1.0}), "no seed"),
        (({0: math.nan, 1: 1.0}, {0: 1.0, 1: 1.0}), "finite"),
        ((OUR_MEANS, THEIR_MEANS, OURS, only(THEIRS, 0, 1)), r"seeds \[2, 3, 4\]"),
        ((THEIR_MEANS, OUR_MEANS, OURS, THEIRS), "expected the metric's values"),
        ((OUR_MEANS, THEIR_MEANS, OURS, THEIRS, np.zeros(3)), "60 items"),
    ],
)
def test_wrong_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        effect(*arguments)


def test_the_interval_over_seeds_is_students():
    values = list(OUR_MEANS.values())
    expected = stats.t.interval(0.95, SEEDS - 1, np.mean(values), stats.sem(values))
    assert interval(values)[1:] == pytest.approx(expected)
    assert interval([0.5]) == interval([0.5, 0.5]) == (0.5, -math.inf, math.inf)
    with pytest.raises(ValueError, match="no values"):
        interval([])

"""How often a table of 6 comparisons with one reference arm is wrong, in 400 simulated repetitions."""

import numpy as np
import pytest

from llm3.ablation.power import ALPHA, Components, over_seeds, power
from llm3.ablation.statistics import effect
from llm3.ablation.variance import Variance, bell_mccaffrey, crossed, variance_over_seeds
from llm3.ablation.verdicts import Claim, findings

REPETITIONS, ARMS, SEEDS, DOCUMENTS = 400, 6, 5, 30
SIZES = np.random.default_rng(1).integers(1, 7, DOCUMENTS)  # items of each document
ITEMS = int(SIZES.sum())
SHARES = SIZES / ITEMS


def simulated(seed, arm_and_document, item, both, binary=False, shift=0.0, random=0):
    """Sums of documents over all items, [repetitions, 1 + arms, seeds, documents]; the first arm is the reference.

    The first four: standard deviations of random effects. Those of items are the same in all arms; shift: what all
    other arms are better by.
    """
    draw = np.random.default_rng(random).standard_normal
    size = REPETITIONS, ARMS + 1
    scores = (
        seed * draw((*size, SEEDS, 1)) + both * draw((*size, SEEDS, ITEMS)) + item * draw((REPETITIONS, 1, 1, ITEMS))
    )
    scores += np.repeat(arm_and_document * draw((*size, 1, DOCUMENTS)), SIZES, axis=3)
    if binary:
        scores = (scores > 0).astype(float)
    scores[:, 1:] += shift
    return np.add.reduceat(scores, np.cumsum(SIZES) - SIZES, axis=3) / ITEMS


def compared(sums, with_items=True):
    """The differences of the arms from the reference and their variances, [repetitions, arms]."""
    panels = (sums[:, 1:] - sums[:, :1]).reshape(-1, SEEDS, DOCUMENTS)
    variances = [variance_over_seeds([panel.sum(axis=1)]) for panel in panels]
    if with_items:
        variances = [crossed([panel], SHARES, found) for panel, found in zip(panels, variances, strict=True)]
    shape = REPETITIONS, ARMS
    stacked = Variance(*(np.reshape(each, shape) for each in np.array(variances).T))
    return panels.sum(axis=2).mean(axis=1).reshape(shape), stacked


def rejected(sums, with_items=True):
    """Which comparisons Holm's first step rejects: if it rejects none, neither does any later one."""
    differences, variances = compared(sums, with_items)
    return np.abs(differences) > variances.half_width(ALPHA / ARMS)


SCENARIOS = {
    "seeds alone": (0.05, 0.0, 0.5, 0.3),
    "large effects of seeds": (1.0, 0.0, 0.5, 0.3),
    "no other variance than that of seeds": (0.1, 0.0, 0.0, 0.0),
    "large effects of documents": (0.05, 0.5, 0.5, 0.3),
    "effects of seeds and documents": (0.1, 0.3, 0.5, 0.3),
    "right or wrong, seeds alone": (0.3, 0.0, 1.5, 1.0, True),
    "right or wrong, seeds and documents": (0.3, 0.5, 1.5, 1.0, True),
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_arms_that_do_not_differ_are_called_different_in_at_most_5_percent_of_tables(scenario):
    wrong = rejected(simulated(*SCENARIOS[scenario])).any(axis=1)
    assert wrong.mean() <= ALPHA


@pytest.mark.parametrize("alpha", [ALPHA, ALPHA / ARMS])
@pytest.mark.parametrize("seeds", [2, 3, 5, 20])
@pytest.mark.parametrize("documents", [2, 4, 11, 201])
def test_the_test_keeps_its_level_whatever_part_is_large(seeds, documents, alpha):
    """Mean squares of an analysis of variance are independent multiples of chi squares."""
    random, draws = np.random.default_rng(0), 10_000
    seed_df, item_df = seeds - 1, documents - 1

    def estimate(expected, df):
        return expected * random.chisquare(df, draws) / df

    for seed, item, both in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0.1, 0), (1, 1, 0.3), (0.1, 1, 0.1), (0, 1, 1)):
        shared = estimate(both, seed_df * item_df)
        variance = Variance(estimate(seed + both, seed_df), seed_df, estimate(item + both, item_df), item_df, shared)
        wrong = np.abs(random.standard_normal(draws)) * np.sqrt(seed + item + both) > variance.half_width(alpha)
        assert wrong.mean() < alpha + 3.5 * np.sqrt(alpha / draws), (seed, item, both)


def test_items_alone_would_call_arms_different_that_differ_by_seed_alone():
    differences, variances = compared(simulated(0.1, 0.0, 0.5, 0.3))
    of_items = variances._replace(seed=0.0)
    assert (np.abs(differences) > of_items.half_width(ALPHA / ARMS)).any(axis=1).mean() > 0.5


def test_verdicts_of_whole_tables_are_wrong_where_holms_first_step_is():
    sums = simulated(0.05, 0.0, 0.5, 0.3) * ITEMS
    documents, claims, wrong = np.arange(DOCUMENTS), [Claim("better", 0.01)] * ARMS, []
    for arms in sums[:30]:
        values = [dict(enumerate(each)) for each in arms.sum(axis=2) / ITEMS]
        scores = [dict(enumerate(each)) for each in arms]
        pairs = ((values[arm], values[0], scores[arm], scores[0], documents, SIZES) for arm in range(1, ARMS + 1))
        wrong.append(any(each.shown for each in findings([effect(*pair) for pair in pairs], claims)))
    assert wrong == rejected(sums / ITEMS).any(axis=1)[:30].tolist() and any(wrong)


@pytest.mark.parametrize(
    ("shift", "seed", "document", "both"), [(0.25, 0.03, 0.0, 0.6), (0.4, 0.05, 0.3, 0.3), (0.9, 0.25, 0.3, 0.3)]
)
def test_a_planted_effect_is_found_at_the_stated_power(shift, seed, document, both):
    """With the true components: differences have twice the variance of an arm."""
    sums = simulated(seed, document, 0.5, both, shift=shift)
    spread, (_, df) = float(np.sum(SHARES**2)), bell_mccaffrey(SHARES)
    cells = Components(2 * seed**2, 2 * document**2 * spread, 2 * both**2 / ITEMS, items=1, item_df=df)
    stated = power(shift, cells, SEEDS, items=1, alpha=ALPHA / ARMS)
    assert 0.3 < stated < 0.97
    found = rejected(sums)[:, 0].mean()
    assert found == pytest.approx(stated, abs=2.6 * np.sqrt(stated * (1 - stated) / REPETITIONS)), "99 % binomial error"


def test_a_planted_effect_over_seeds_alone_is_found_at_the_stated_power():
    found = rejected(simulated(0.1, 0.0, 0.5, 0.0, shift=0.4), with_items=False)[:, 0].mean()
    stated = power(0.4, over_seeds(2**0.5 * 0.1), SEEDS, alpha=ALPHA / ARMS)
    assert found == pytest.approx(stated, abs=2.6 * np.sqrt(stated * (1 - stated) / REPETITIONS))

"""Power and numbers of seeds, compared with scipy and Cohen's tables."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from llm3.ablation import power as planned
from llm3.ablation.power import Components, needed, over_seeds, power, seeds_needed
from llm3.ablation.statistics import effect


@pytest.mark.parametrize(("deviation", "seeds", "alpha"), [(0.02, 5, 0.05), (0.05, 8, 0.05 / 6), (0.4, 3, 0.05)])
def test_the_power_over_seeds_is_that_of_the_noncentral_t_distribution(deviation, seeds, alpha):
    critical, shift = stats.t.isf(alpha / 2, seeds - 1), 0.03 / deviation * seeds**0.5
    expected = stats.nct.sf(critical, seeds - 1, shift) + stats.nct.cdf(-critical, seeds - 1, shift)
    assert power(0.03, over_seeds(deviation), seeds, alpha=alpha) == pytest.approx(expected)


@pytest.mark.parametrize(("standardized", "pairs"), [(0.2, 199), (0.5, 34), (0.8, 15)])
def test_small_medium_and_large_effects_need_the_pairs_that_textbooks_have(standardized, pairs):
    assert seeds_needed(standardized, over_seeds(1.0)) == pairs


@settings(max_examples=20)
@given(st.integers(2, 30), st.floats(0.1, 2), st.floats(0, 0.1), st.floats(0, 1))
def test_power_grows_with_effect_seeds_and_items(seeds, smallest, of_seed, both):
    components = Components(of_seed, 1.0, both, items=50, item_df=49)
    found = power(smallest, components, seeds)
    assert 0 < found <= 1
    assert power(1.1 * smallest, components, seeds) >= found - 1e-9
    assert power(smallest, components, seeds + 1) >= found - 1e-6
    assert power(smallest, components, seeds, items=60) >= found - 1e-6


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("alpha", [0.05, 0.05 / 50])
def test_power_is_a_number_for_tiny_and_huge_effects(alpha):
    found = [power(size, over_seeds(1.0), 5, alpha=alpha) for size in np.geomspace(1e-4, 1e6, 60)]
    assert np.all(np.diff(found) > -1e-6) and found[0] == pytest.approx(alpha, rel=0.01) and found[-1] == 1


def test_the_first_number_of_seeds_with_the_power_is_found():
    components = Components(0.02**2, 0.3**2, 0.3**2, items=500, item_df=499)
    seeds = seeds_needed(0.05, components)
    assert power(0.05, components, seeds) >= 0.8 > power(0.05, components, seeds - 1)


def test_where_items_dominate_no_number_of_seeds_is_enough_but_items_are():
    components = Components(0.01**2, 0.5**2, 0.1**2, items=100, item_df=99)
    assert needed(0.05, components).seeds is None
    seeds, items = needed(0.05, components, seeds=5)
    assert seeds is None and power(0.05, components, 5, items) >= 0.8 > power(0.05, components, 5, items - 1)


def test_power_is_unknown_without_a_deviation_and_zero_with_one_seed():
    assert power(0.02, None, 5) is None and needed(0.02, None, 5) == (None, None)
    assert power(0.02, over_seeds(0.01), 1) == 0
    with pytest.raises(ValueError, match="smallest=0"):
        power(0, over_seeds(0.01), 5)


def test_components_found_after_the_runs_give_back_the_variance_of_the_effect():
    random = np.random.default_rng(0)
    scores = {seed: row for seed, row in enumerate(0.1 * random.normal(size=(5, 1)) + random.normal(size=(5, 40)))}
    zeros = {seed: np.zeros(40) for seed in scores}
    ours, theirs = ({seed: row.mean() for seed, row in arm.items()} for arm in (scores, zeros))
    found = effect(ours, theirs, scores, zeros)
    seed, item, both, items, item_df = planned.found(found)
    assert seed / 5 + item / 40 + both / 200 == pytest.approx(max(found.variance.total, found.variance.shared))
    assert (items, item_df) == (40, pytest.approx(39))
    assert planned.found(effect(ours, theirs)) == over_seeds(np.std(list(ours.values()), ddof=1))
    assert planned.found(effect({0: 1.0}, {0: 0.5})) is None

"""The power of a comparison of two arms, and the seeds or items that it needs.

The power is the probability that a difference of a given size is found (Cohen 1988, chapter 2; Card et al. 2020). Ask
before an ablation with an assumed or pilot standard deviation (`over_seeds`), and after it with the variance found
(`found`). For m comparisons in a table ask with alpha / m, the level of Holm's first step. The power for the difference
that happened to be observed says no more than the p-value (Hoenig and Heisey 2001): ask for the smallest that counts.

The test is that of `llm3.ablation.statistics`. Over seeds alone its power follows from the noncentral t distribution;
over seeds and items it is averaged over the distributions of the two estimated variances.
"""

import bisect
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from llm3.ablation.statistics import Effect
from llm3.ablation.variance import Variance

ALPHA = 0.05
POWER = 0.8
MOST_SEEDS = 1000
MOST_ITEMS = 10**9
NODES = 64  # quantiles of each estimated variance
FAR = 1000.0  # standard errors; scipy's series does not converge much farther away


class Components(NamedTuple):
    """Variances of the difference of two arms: of one seed, of one item, and of one item of one seed.

    The difference over n seeds and I items has the variance seed / n + item / I + both / (n * I).
    """

    seed: float
    item: float = 0.0
    both: float = 0.0
    items: int = 0  # items of the evaluation at hand; 0: only seeds are sampled
    item_df: float = 0.0  # degrees of freedom that `items` have: documents - 1


def over_seeds(deviation: float) -> Components:
    """From the standard deviation of the difference over seeds, assumed or from a pilot; items are fixed."""
    return Components(deviation**2)


def found(effect: Effect) -> Components | None:
    """The components that were observed; None with one seed, or if all differences are equal."""
    variance, seeds, items = effect.variance, effect.seeds, effect.items if effect.variance.item_df else 0
    if not variance.seed_df or not variance.seed + variance.item:
        return None
    of_seed, of_item = (max(0.0, each - variance.shared) for each in (variance.seed, variance.item))
    return Components(of_seed * seeds, of_item * items, variance.shared * seeds * items, items, variance.item_df)


def power(
    smallest: float, components: Components | None, seeds: int, items: int = 0, alpha: float = ALPHA
) -> float | None:
    """The probability that a true difference of `smallest` is found, with p <= alpha in a two-sided test.

    seeds: pairs; items: 0 for those of the components. None if the components are not known. 0 with one seed. Raises
    ValueError unless `smallest` is above 0.
    """
    if not smallest > 0:
        raise ValueError(f"smallest={smallest}: expected a difference above 0")
    if components is None:
        return None
    if seeds < 2:
        return 0.0
    variance = _variance(components, seeds, items or components.items)
    if not variance.total:
        return 1.0
    return (_crossed_power if components.items else _power_over_seeds)(smallest, variance, alpha)


def _variance(components: Components, seeds: int, items: int) -> Variance:
    """The variance of the difference with numbers of seeds and items."""
    if not components.items:
        return Variance(components.seed / seeds, seeds - 1)
    shared = components.both / (seeds * items)
    item_df = max(1.0, components.item_df * items / components.items)
    return Variance(components.seed / seeds + shared, seeds - 1, components.item / items + shared, item_df, shared)


def _power_over_seeds(smallest: float, variance: Variance, alpha: float) -> float:
    from scipy.stats import nct

    error = math.sqrt(variance.total)
    critical, shift = float(variance.half_width(alpha)) / error, min(smallest / error, FAR)
    wrong_sign = nct.cdf(-critical, variance.seed_df, shift) if shift < 4 else 0.0  # below 1e-4; there scipy gives NaN
    return float(nct.sf(critical, variance.seed_df, shift) + wrong_sign)


def _crossed_power(smallest: float, variance: Variance, alpha: float) -> float:
    """The mean over the distributions of the estimated parts by seeds and by items, at equally likely quantiles."""
    from scipy.stats import chi2, norm

    places = (np.arange(NODES) + 0.5) / NODES
    seed = variance.seed * chi2.ppf(places, variance.seed_df)[:, None] / variance.seed_df
    item = variance.item * chi2.ppf(places, variance.item_df) / variance.item_df
    half, error = variance._replace(seed=seed, item=item).half_width(alpha), math.sqrt(variance.total)
    return float(np.mean(norm.sf((half - smallest) / error) + norm.cdf((-half - smallest) / error)))


class Need(NamedTuple):
    """What gives the wanted power; None: no number up to MOST_SEEDS or MOST_ITEMS does."""

    seeds: int | None  # with the items at hand
    items: int | None  # with the seeds at hand; sought only where no number of seeds does and items are sampled


def needed(
    smallest: float,
    components: Components | None,
    seeds: int = 0,
    alpha: float = ALPHA,
    wanted: float = POWER,
) -> Need:
    """The fewest seeds that find a true difference of `smallest` with the wanted power.

    More seeds do not help where items dominate the error; then the fewest items that would, with the `seeds` at hand.
    Raises ValueError unless `smallest` is above 0.
    """

    def with_seeds(number: int) -> float:
        return power(smallest, components, number, alpha=alpha) or 0.0

    def with_items(number: int) -> float:
        return power(smallest, components, seeds, number, alpha) or 0.0

    of_seeds = _first(with_seeds, MOST_SEEDS, wanted)
    if of_seeds is not None or components is None or not components.items or seeds < 2:
        return Need(of_seeds, None)
    return Need(None, _first(with_items, MOST_ITEMS, wanted))


def _first(power_of: Callable[[int], float], most: int, wanted: float) -> int | None:
    """The first number from 2 whose power is the wanted one; power grows with the number."""
    found = bisect.bisect_left(range(2, most + 1), wanted, key=power_of) + 2
    return found if found <= most else None


def seeds_needed(
    smallest: float, components: Components | None, alpha: float = ALPHA, wanted: float = POWER
) -> int | None:
    """As `needed`, the seeds alone."""
    return needed(smallest, components, alpha=alpha, wanted=wanted).seeds

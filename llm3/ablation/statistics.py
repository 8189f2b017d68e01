"""The difference of two arms in a metric, so that it holds for new seeds and, with scores of items, for new items.

Functions of plain numbers and arrays. Seeds and items are crossed: every seed scores the same items. So the variance of
a difference has a part of seeds, a part of items and a part of both, estimated as in an analysis of variance (Searle,
Casella and McCulloch 1992, chapter 4; Baayen, Davidson and Bates 2008 for random seeds and items). All of it is "seeds
plus items minus what both count" (Cameron, Gelbach and Miller 2011, equation 2.11; Owen 2007). The items of a document
are one cluster. For documents of unequal sizes, bias and degrees of freedom are corrected as by Bell and McCaffrey 2002
with errors that all items of a document share. Ratios are linearized (Cochran 1977, section 6.4).

Tests and intervals. With one part, Student's t. With two, the bound of Banerjee 1960: reject at level a if
difference^2 > t_seeds(a)^2 * seeds + max(0, t_items(a)^2 * items - z(a)^2 * both). The bound rejects at most a share a
of true nulls whatever the ratio of seeds and items; with the last term, this was checked by simulation for 2 to 20
seeds and 2 to 200 documents. The common approximation by Satterthwaite 1946 rejects more: with 5 seeds and a small part
of items 1.5 % at level 0.8 % (that of Holm's first step for 6 comparisons), with 2 seeds 5 %.

Why t and not an exact sign-flip test: with n pairs of seeds such a test has no p-value below 2^(1-n), 0.0625 for 5.
Only where all differences are equal, so that t has no variance, that p-value is given instead of 0.
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from llm3.ablation.variance import Variance, crossed, document_sums, documents_of, variance_over_seeds
from llm3.report.statistics import CONFIDENCE, Interval, mcnemar, over_seeds, ratio

Scores = Mapping[int, np.ndarray]  # {seed: scores [items]}
SMALLEST_P = 1e-100


class Effect(NamedTuple):
    """A difference of two arms, ours - theirs, with its 95 % interval and the two-sided p-value of "no difference".

    Neither is adjusted for other comparisons. Without a test (one seed and no items) the interval is infinite and p 1.
    """

    value: float
    low: float
    high: float
    p: float
    variance: Variance  # of `value`, in parts
    seeds: int  # pairs of seeds, or the seeds of the arm with fewer of them
    items: int
    documents: int  # clusters of items
    least_p: float  # what an exact test gives if all differences are equal
    test: str
    differences: dict[int, float]  # {seed: ours - theirs}; empty if seeds are not paired

    @property
    def covers(self) -> str:
        """What the interval holds for."""
        names = ["new seeds"] * (self.variance.seed_df > 0) + ["new items"] * (self.variance.item_df > 0)
        return " and ".join(names) or "these seeds only"

    def p_value(self, null: float = 0.0) -> float:
        """The two-sided p-value of "the difference is `null`"."""
        return _p_value(abs(self.value - null), self.variance, self.least_p)

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """The interval with another confidence, e.g. 1 - 0.05 / m for m intervals that hold at once (Bonferroni)."""
        half = _half_width(1 - confidence, self.variance, self.least_p)
        return self.value - half, self.value + half


def _half_width(alpha: float, variance: Variance, least_p: float) -> float:
    """Infinite without a test; with no variance 0 if an exact test could reject at that level."""
    if not variance.seed_df and not variance.item_df:
        return math.inf
    if not variance.seed and not variance.item:
        return 0.0 if least_p <= alpha else math.inf
    return float(variance.half_width(alpha))


def _p_value(distance: float, variance: Variance, least_p: float) -> float:
    """The alpha at which the half width is the distance from the null."""
    from scipy.optimize import brentq
    from scipy.special import stdtr

    if distance == 0 or (not variance.seed_df and not variance.item_df):
        return 1.0
    if not variance.seed and not variance.item:
        return least_p
    if not variance.item:
        return max(SMALLEST_P, 2 * float(stdtr(variance.seed_df, -distance / math.sqrt(variance.seed))))

    def excess(log_p: float) -> float:
        return float(variance.half_width(math.exp(log_p))) - distance

    least = math.log(SMALLEST_P)
    return SMALLEST_P if excess(least) < 0 else math.exp(brentq(excess, least, 0.0, xtol=1e-12))


def interval(values: Iterable[float]) -> Interval:
    """The mean of values of independent seeds with Student's 95 % interval; infinite if they cannot give one.

    That is with one value, and with up to 5 equal ones. Raises ValueError without values.
    """
    listed = list(values)
    if not listed:
        raise ValueError("no values: expected one for each seed")
    found = over_seeds(listed)
    if found is None or (found.low == found.high and 2.0 ** (1 - len(listed)) > 1 - CONFIDENCE):
        return Interval(float(np.mean(listed)), -math.inf, math.inf)
    return Interval(*found[:3])


def effect(
    ours: Mapping[int, float],
    theirs: Mapping[int, float],
    our_items: Scores | None = None,
    their_items: Scores | None = None,
    clusters: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    paired: bool = True,
) -> Effect:
    """The difference of two arms in a metric, ours - theirs.

    ours, theirs: {seed: value}. Equal seeds are paired if there are two of them, or if an arm has only one seed;
    otherwise (or with paired=False) the arms are compared by Welch 1947. Pairs lose the seeds that one arm lacks.
    our_items, their_items: {seed: scores [items]} of the same items in the same order, such that sum(scores) is
    value * items, or value * sum(weights) for ratios such as bits per byte (weights [items]: bytes, scores: bits).
    clusters [items]: the document of each item; None: each item is one.
    Raises ValueError if an arm has no seed, a value is not finite, scores of a seed are missing, or scores do not
    give the value.
    """
    kept = _pairs(ours, theirs) if paired else []
    seeds = (kept, kept) if kept else (sorted(ours), sorted(theirs))
    values = [_values(arm, of) for arm, of in zip((ours, theirs), seeds, strict=True)]
    samples = _compared(values, bool(kept))
    variance, items, documents = variance_over_seeds(samples), 0, 0
    if our_items is not None and their_items is not None:
        both = zip((our_items, their_items), seeds, values, strict=True)
        sums = [document_sums(scores, of, given, clusters, weights) for scores, of, given in both]
        panels = _compared([each.sums for each in sums], bool(kept))
        variance = crossed(panels, sums[0].shares, variance)
        items, documents = sums[0].items, len(sums[0].shares)
    found = Effect(
        value=float(sum(each.mean() for each in samples)),
        low=-math.inf,
        high=math.inf,
        p=1.0,
        variance=variance.without_rounding(1e-12 * max(float(np.abs(each).max()) for each in values)),
        seeds=min(map(len, samples)),
        items=items,
        documents=documents,
        least_p=_least_p([len(each) for each in samples], documents),
        test=_name(len(samples), variance),
        differences=dict(zip(kept, samples[0].tolist(), strict=True)) if kept else {},
    )
    low, high = found.interval()
    found = found._replace(low=low, high=high, p=found.p_value())
    exact = kept and not variance.seed_df and weights is None and 0 < items == documents
    return _with_mcnemar(found, panels[0][0] * items) if exact else found


def _pairs(ours: Mapping[int, float], theirs: Mapping[int, float]) -> list[int]:
    """The seeds that both arms have, if there are enough of them to pair the arms by seed."""
    common = sorted(ours.keys() & theirs.keys())
    return common if len(common) >= min(len(ours), len(theirs), 2) else []


def _values(arm: Mapping[int, float], seeds: list[int]) -> np.ndarray:
    if not seeds:
        raise ValueError("an arm has no seed: expected at least one")
    values = np.array([arm[seed] for seed in seeds], np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"values of the seeds {seeds} are {values}: expected finite numbers")
    return values


def _compared(arms: list[np.ndarray], paired: bool) -> list[np.ndarray]:
    """One sample of differences if arms are paired, else two samples, theirs negated."""
    ours, theirs = arms
    return [ours - theirs] if paired else [ours, -theirs]


def _with_mcnemar(found: Effect, differences: np.ndarray) -> Effect:
    """With one seed and answers that are right or wrong, the p-value is that of McNemar's exact test."""
    whole = np.round(differences)
    if np.abs(whole).max() > 1 or np.abs(differences - whole).max() > 1e-9:
        return found
    return found._replace(p=mcnemar(whole), test="exact McNemar over items (one seed)")


def _name(samples: int, variance: Variance) -> str:
    if not variance.seed_df:
        return "t over items (one seed)" if variance.item_df else "none (one seed)"
    seeds = "paired t over seeds" if samples == 1 else "Welch's t over unpaired seeds"
    return f"{seeds} and items (Banerjee)" if variance.item_df else seeds


def _least_p(seeds: list[int], documents: int) -> float:
    """The p-value of sign flips of pairs, or of permutations of two arms, for the most extreme of all outcomes."""
    if min(seeds) > 1:
        return 2.0 ** (1 - seeds[0]) if len(seeds) == 1 else 2 / math.comb(sum(seeds), seeds[0])
    return max(SMALLEST_P, 2.0 ** (1 - documents)) if documents else 1.0


def over_documents(
    ours: Scores, theirs: Scores, clusters: np.ndarray | None = None, weights: np.ndarray | None = None
) -> Interval:
    """The difference of two ratios, averaged over the common seeds, with its bootstrap interval over documents.

    It holds for new documents and these seeds only; `effect` holds for both. Arguments as in `effect`. Resamples are
    those of `llm3.report.statistics.resampled_sums`. Raises ValueError without a common seed.
    """
    if not (common := sorted(ours.keys() & theirs.keys())):
        raise ValueError("the arms have no seed in common: expected at least one")
    mean = np.mean([np.asarray(ours[seed], np.float64) - theirs[seed] for seed in common], axis=0)
    numbers, weight = documents_of(len(mean), clusters, weights)
    return ratio(np.bincount(numbers, mean), np.bincount(numbers, weight))

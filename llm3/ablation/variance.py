"""Parts of the variance of a difference of two arms: by seeds, by items, and by both together.

Every seed scores the same items, in documents of unequal sizes. Sources: see `llm3.ablation.statistics`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np


class Variance(NamedTuple):
    """The variance of a difference in parts, with their degrees of freedom (0: the part is unknown).

    Fields are numbers, or arrays of equal shape. `seed` and `item` both contain `shared`.
    """

    seed: Any  # as seeds vary: by seeds alone, and by seed and item together
    seed_df: Any
    item: Any = 0.0  # as items vary: by items alone, and by seed and item together
    item_df: Any = 0.0
    shared: Any = 0.0  # by seed and item together

    @property
    def total(self) -> Any:
        """The variance of the difference; a negative part of items alone counts as zero."""
        return self.seed + np.maximum(self.item - self.shared, 0.0)

    def half_width(self, alpha: float) -> Any:
        """The half width of the interval with confidence 1 - alpha; a test rejects at level alpha beyond it."""
        from scipy.special import ndtri, stdtrit  # as scipy.stats.norm.ppf and t.ppf, 50 times as fast

        of_seed = stdtrit(np.maximum(self.seed_df, 1.0), alpha / 2) ** 2 * self.seed
        of_item = stdtrit(np.maximum(self.item_df, 1.0), alpha / 2) ** 2 * self.item
        return np.sqrt(of_seed + np.maximum(of_item - ndtri(alpha / 2) ** 2 * self.shared, 0.0))

    def without_rounding(self, error: float) -> "Variance":
        """Parts that are no larger than the square of a rounding error are zero."""
        seed, item, shared = (each if each > error**2 else 0.0 for each in (self.seed, self.item, self.shared))
        return self._replace(seed=seed, item=item, shared=shared)


def variance_over_seeds(samples: list[np.ndarray]) -> Variance:
    """The variance of the sum of the samples' means. samples: one, or two with the degrees of freedom of Welch 1947."""
    least = min(map(len, samples)) - 1
    if least < 1:
        return Variance(0.0, 0.0)
    parts = [float(each.var(ddof=1)) / len(each) for each in samples]
    if not (total := sum(parts)):
        return Variance(0.0, least)
    squares = sum(part**2 / (len(each) - 1) for part, each in zip(parts, samples, strict=True))
    return Variance(total, total**2 / squares)


class DocumentSums(NamedTuple):
    """Scores of items, summed over documents and divided by the total weight, so that their sum is the metric."""

    sums: np.ndarray  # [seeds, documents]
    shares: np.ndarray  # shares of the documents in the total weight [documents]
    items: int


def documents_of(items: int, clusters: np.ndarray | None, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The number of its document and the weight of each item, both [items]. Raises ValueError for other lengths."""
    numbers = np.arange(items) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
    weight = np.ones(items) if weights is None else np.asarray(weights, np.float64)
    if len(numbers) != items or len(weight) != items:
        raise ValueError(f"{items} items: expected as many clusters ({len(numbers)}) and weights ({len(weight)})")
    return numbers, weight


def document_sums(
    scores: Mapping[int, np.ndarray],
    seeds: list[int],
    values: np.ndarray,
    clusters: np.ndarray | None,
    weights: np.ndarray | None,
) -> DocumentSums:
    """The sums of one arm. Raises ValueError if seeds are missing or the sums are not the metric's values [seeds]."""
    if missing := [seed for seed in seeds if seed not in scores]:
        raise ValueError(f"no scores of items for the seeds {missing}: expected those of every seed")
    table = np.stack([np.asarray(scores[seed], np.float64) for seed in seeds])
    numbers, weight = documents_of(table.shape[1], clusters, weights)
    total = weight.sum()
    if not np.allclose(found := table.sum(axis=1) / total, values, rtol=1e-2, atol=1e-3):
        raise ValueError(f"scores of items give {found}: expected the metric's values {values}")
    sums = np.stack([np.bincount(numbers, row) for row in table])
    return DocumentSums(sums / total, np.bincount(numbers, weight) / total, table.shape[1])


def crossed(panels: list[np.ndarray], shares: np.ndarray, seeds: Variance) -> Variance:
    """The variance over seeds and documents; that over seeds alone if there is one document.

    panels [seeds, documents]: DocumentSums.sums, one panel of differences for paired arms, else two, theirs negated.
    seeds: the variance over seeds of the same samples.
    """
    if len(shares) < 2:
        return seeds
    correction, df = bell_mccaffrey(shares)
    mean = np.sum([panel.mean(axis=0) for panel in panels], axis=0)
    total = correction * float(np.sum((mean - shares * mean.sum()) ** 2))
    if not seeds.seed_df:
        return Variance(0.0, 0.0, total, df)
    shared = 0.0
    for panel in panels:
        deviations = panel - panel.mean(axis=0)
        rest = deviations - shares * deviations.sum(axis=1, keepdims=True)
        shared += correction * float(np.sum(rest**2)) / (len(panel) * (len(panel) - 1))
    return Variance(seeds.seed, seeds.seed_df, total, df, shared)


def bell_mccaffrey(shares: np.ndarray) -> tuple[float, float]:
    """What makes the sum of squared residuals of documents an unbiased variance of their mean; degrees of freedom.

    shares [documents]: their shares of the total weight, where the standard deviation of a document's sum is
    proportional to its share. Equal shares give G / (G - 1) and G - 1. Bell and McCaffrey 2002, section 4.
    """
    _, _, q2, q3, q4, q5 = (float(np.sum(shares**power)) for power in range(6))
    trace = q2 - 2 * q3 + q2**2
    squared = q4 + 4 * q2 * q4 - 4 * q5 + q2**4 + 2 * q3**2 - 4 * q2**2 * q3
    return q2 / trace, trace**2 / squared

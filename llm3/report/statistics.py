"""Intervals of a metric over its items, and tests of the difference between two stages on the same items.

Functions of arrays with one entry per item, without knowledge of rows, files or tables. All intervals are 95 %.

Sources. Share of right answers: the score interval of Wilson 1927. Ratios and F1: the percentile bootstrap over items
(Efron and Tibshirani 1993, chapter 13). Difference of shares: the exact test of McNemar 1947. Difference of means: the
paired t test (Student 1908); of ratios, the same on the linearized ratio (Cochran 1977, section 6.4); where all
differences are equal, the sign test (Conover 1999, section 3.4). Several tests in a table: Holm 1979. Calibration: Guo
et al. 2017, equation 3; Brier 1950.
"""

import functools
import math
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 2000
DRAWS = 2 * 10**7  # with more than DRAWS / RESAMPLES items there are fewer resamples, down to LEAST_RESAMPLES
LEAST_RESAMPLES = 200
BINS = 15  # bins of confidence, as in the metric `ece`


class Interval(NamedTuple):
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """A difference with its 95 % interval, the two-sided p-value of "no difference", and what it was paired over."""

    value: float
    low: float
    high: float
    p: float
    pairs: int
    test: str  # "exact McNemar", "paired t", "t over seeds", "unpaired z" or, if all pairs differ equally, "sign test"
    unit: str = "items"  # what the pairs are: "items" or "seeds"


def _normal_quantile() -> float:
    from scipy.special import ndtri  # scipy.stats, which has the same functions, takes half a second to import

    return float(ndtri((1 + CONFIDENCE) / 2))


def wilson(hits: float, items: int) -> Interval:
    """The share of `hits` among `items`, with Wilson's score interval. Raises ValueError without items."""
    if items < 1:
        raise ValueError(f"{items} items: expected at least 1")
    share, z = hits / items, _normal_quantile()
    middle = (share + z**2 / (2 * items)) / (1 + z**2 / items)
    half = z / (1 + z**2 / items) * math.sqrt(share * (1 - share) / items + z**2 / (4 * items**2))
    return Interval(share, min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half)))


@functools.lru_cache(maxsize=8)
def _draws(items: int, resamples: int, part: int) -> np.ndarray:
    """How often each item is drawn in each resample: float32 [resamples, items], the same at every call."""
    random = np.random.default_rng([items, part])
    drawn = random.integers(items, size=(resamples, items)) + items * np.arange(resamples)[:, None]
    return np.bincount(drawn.reshape(-1), minlength=resamples * items).reshape(resamples, items).astype(np.float32)


def resampled_sums(columns: np.ndarray) -> np.ndarray:
    """The sums of the columns [items, k] over resamples of the items, drawn with replacement: float64 [resamples, k].

    Draws depend on the number of items alone, so two stages on the same items see the same resamples.
    """
    items = len(columns)
    resamples = min(RESAMPLES, max(LEAST_RESAMPLES, DRAWS // items))
    at_once = min(resamples, max(1, DRAWS // 5 // items))
    parts = [_draws(items, min(at_once, resamples - first), first) @ columns for first in range(0, resamples, at_once)]
    return np.concatenate(parts).astype(np.float64)


def _percentiles(value: float, resampled: np.ndarray) -> Interval:
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(value, float(low), float(high))


def ratio(sums: np.ndarray, weights: np.ndarray | None = None) -> Interval:
    """sum(sums) / sum(weights), with its bootstrap interval. sums, weights: [items]; weights None: the mean of `sums`.

    Bits per byte: nats / ln 2 of each document over its bytes.
    """
    columns = np.stack([sums, np.ones(len(sums)) if weights is None else weights], axis=1).astype(np.float64)
    top, bottom = resampled_sums(columns).T
    total = columns.sum(axis=0)
    return _percentiles(float(total[0] / total[1]), top / bottom)


def macro_f1(truth: np.ndarray, prediction: np.ndarray) -> Interval:
    """The mean F1 of the classes that occur in truth or prediction, with its bootstrap interval. Both: [items]."""
    names = np.unique(np.concatenate([truth, prediction]))
    true, predicted = (np.searchsorted(names, each)[:, None] == np.arange(len(names)) for each in (truth, prediction))
    columns = np.concatenate([true & predicted, true, predicted], axis=1).astype(np.float32)

    def mean_f1(sums: np.ndarray) -> np.ndarray:
        hits, in_truth, in_prediction = np.split(sums, 3, axis=-1)
        seen = in_truth + in_prediction
        scores = 2 * hits / np.maximum(seen, 1)
        return scores.sum(axis=-1) / (seen > 0).sum(axis=-1)

    return _percentiles(float(mean_f1(columns.sum(axis=0, dtype=np.float64))), mean_f1(resampled_sums(columns)))


def paired(ours: np.ndarray, theirs: np.ndarray, weights: np.ndarray | None = None) -> Difference | None:
    """The difference of two means over the same items, or of two ratios with the same weights; None below two items.

    ours, theirs, weights: [items]. Without weights it is the paired t test; if every score is 0 or 1, the p-value is
    that of McNemar's exact test, the interval that of the t test.
    """
    differences = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
    items = len(differences)
    if items < 2:
        return None
    shares = np.ones(items) if weights is None else np.asarray(weights, np.float64)
    value = float(differences.sum() / shares.sum())
    found = _from_t((differences - value * shares) / shares.mean(), value, "paired t", "items")
    if weights is None and all(set(np.unique(each)) <= {0, 1} for each in (ours, theirs)):
        return found._replace(p=mcnemar(differences), test="exact McNemar")
    return found


def _from_t(residuals: np.ndarray, value: float, test: str, unit: str) -> Difference:
    """The t interval of a mean `value`, from the residuals [n] around it.

    If all differences are equal, and not zero, the interval is that value, and p that of the two-sided sign test.
    """
    from scipy.special import stdtr, stdtrit

    number = len(residuals)
    error = math.sqrt(float(np.sum(residuals**2)) / (number - 1) / number)
    if error <= 1e-12 * abs(value):  # all differences are equal: t, which takes their spread for known, is infinite
        if not value:
            return Difference(value, value, value, 1.0, number, test, unit)
        return Difference(value, value, value, 2.0 ** (1 - number), number, "sign test", unit)
    half = float(stdtrit(number - 1, (1 + CONFIDENCE) / 2)) * error
    p = 2 * float(stdtr(number - 1, -abs(value) / error))
    return Difference(value, value - half, value + half, p, number, test, unit)


def mcnemar(differences: np.ndarray) -> float:
    """The two-sided p-value of the exact test that as many items are +1 (only ours is right) as -1 (only theirs)."""
    from scipy.special import bdtr

    ours, theirs = int(np.sum(differences > 0)), int(np.sum(differences < 0))
    return min(1.0, 2 * float(bdtr(min(ours, theirs), ours + theirs, 0.5)))  # symmetric, as both are equally likely


def over_seeds(differences: list[float]) -> Difference | None:
    """The mean of differences that are paired by seed, with Student's t over the seeds; None below two seeds."""
    values = np.asarray(differences, np.float64)
    if len(values) < 2:
        return None
    return _from_t(values - values.mean(), float(values.mean()), "t over seeds", "seeds")


def unpaired(ours: float, theirs: float, our_error: float, their_error: float, items: int) -> Difference:
    """The difference of two independent estimates with known standard errors (normal approximation)."""
    from scipy.special import ndtr

    value, error = ours - theirs, math.hypot(our_error, their_error)
    half = _normal_quantile() * error
    p = 2 * float(ndtr(-abs(value) / error)) if error else float(value == 0)
    return Difference(value, value - half, value + half, p, items, "unpaired z")


def holm(values: list[float]) -> list[float]:
    """The p-values adjusted for testing all of them, in the same order (Holm 1979)."""
    order = sorted(range(len(values)), key=values.__getitem__)
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = largest
    return adjusted


class Bin(NamedTuple):
    """The items with a confidence in one bin: their number, their mean confidence and the share of right ones."""

    items: int
    confidence: float
    right: Interval


def reliability(confidence: np.ndarray, right: np.ndarray) -> list[Bin]:
    """The bins with items, of BINS equally wide ones. confidence: [items] in [0, 1]; right: [items], 0 or 1."""
    numbers = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    found = []
    for number in np.unique(numbers):
        inside = numbers == number
        items = int(inside.sum())
        found.append(Bin(items, float(confidence[inside].mean()), wilson(float(right[inside].sum()), items)))
    return found


def calibration_error(bins: list[Bin]) -> float:
    """The expected calibration error: the mean distance of confidence and accuracy, weighted by items."""
    total = sum(each.items for each in bins)
    return sum(each.items * abs(each.right.value - each.confidence) for each in bins) / total


def brier(probabilities: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The Brier score of each item, 0 to 2. probabilities: [items, classes]; truth: class numbers [items]."""
    return ((probabilities - (truth[:, None] == np.arange(probabilities.shape[1]))) ** 2).sum(axis=1)

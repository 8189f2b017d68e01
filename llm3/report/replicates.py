"""Replicates: stages that differ in nothing but the seed, and what their figures estimate."""

import math
import re
from itertools import takewhile
from typing import NamedTuple

CONFIDENCE = 0.95


class Recipe(NamedTuple):
    """At least two complete rows, of different seeds, in the order of their seeds."""

    label: str
    rows: list[dict]

    def values(self, key: str) -> dict[int, float]:
        """{seed: value} of the rows that have one."""
        return {row["seed"]: row[key] for row in self.rows if row[key] is not None}

    def over_seeds(self, key: str) -> list[float]:
        """The values without their seeds."""
        return list(self.values(key).values())

    def mean(self, key: str) -> float | None:
        """The mean over the seeds; None where no row has a value."""
        values = self.over_seeds(key)
        return sum(values) / len(values) if values else None


class Estimate(NamedTuple):
    """A mean over seeds, half the width of its interval, and of how many seeds."""

    mean: float
    half_width: float
    seeds: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval is on one side of 0."""
        return abs(self.mean) > self.half_width


def recipes(rows: list[dict]) -> list[Recipe]:
    """The rows by equal `recipe`, where there are at least two seeds of one; the full recipe first, if there is one.

    Of two rows with the same recipe and seed, the first counts. A label is what the stages' names have in common.
    """
    groups: dict[str, dict[int, dict]] = {}
    for row in rows:
        if row.get("recipe") is not None and row.get("seed") is not None:
            groups.setdefault(row["recipe"], {}).setdefault(row["seed"], row)
    found = [[group[seed] for seed in sorted(group)] for group in groups.values() if len(group) > 1]
    labels = [label([row["stage"] for row in group]) for group in found]
    named = [
        Recipe(name if labels.count(name) == 1 else group[0]["stage"], group)
        for name, group in zip(labels, found, strict=True)
    ]
    return sorted(named, key=lambda recipe: any(row["trainable_params"] != row["params"] for row in recipe.rows))


def label(stages: list[str]) -> str:
    """What names of stages have in common, without a number at its end: that of top2_0 and top2_1 is top2."""
    common = takewhile(lambda letters: len(set(letters)) == 1, zip(*stages, strict=False))
    return re.sub(r"[-_. ]+\d*$", "", "".join(letters[0] for letters in common)) or stages[0]


def collapsed(rows: list[dict]) -> list[dict]:
    """The rows with one row of means in place of each recipe's, called "full x3" for three seeds."""
    found = {id(row): recipe for recipe in recipes(rows) for row in recipe.rows}
    kept: list[dict] = []
    for row in rows:
        recipe = found.get(id(row))
        if recipe is None:
            kept.append(row)
        elif row is next(each for each in rows if found.get(id(each)) is recipe):
            kept.append(_mean_row(recipe))
    return kept


def unreplicated(rows: list[dict]) -> list[dict]:
    """The rows that belong to no recipe of several seeds."""
    inside = {id(row) for recipe in recipes(rows) for row in recipe.rows}
    return [row for row in rows if id(row) not in inside]


def _mean_row(recipe: Recipe) -> dict:
    first, *rest = recipe.rows
    same = {key: value for key, value in first.items() if all(row[key] == value for row in rest)}
    means = {
        key: recipe.mean(key)
        for key, value in first.items()
        if key not in same and isinstance(value, int | float) and key != "seed"
    }
    return dict.fromkeys(first) | same | means | {"stage": f"{recipe.label} x{len(recipe.rows)}"}


def estimate(values: list[float]) -> Estimate | None:
    """The mean of independent values with the 95 % interval of Student's t (n - 1 degrees of freedom); None below 2."""
    from scipy.stats import t

    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    quantile = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return Estimate(mean, quantile * deviation / math.sqrt(len(values)), len(values))


def paired(recipe: Recipe, reference: Recipe, key: str) -> Estimate | None:
    """The difference of `recipe` to `reference` over the seeds that both have."""
    ours, theirs = recipe.values(key), reference.values(key)
    return estimate([value - theirs[seed] for seed, value in ours.items() if seed in theirs])

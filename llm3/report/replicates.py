"""Replicates: stages that differ only in the seed, and estimates over their seeds."""

import re
from itertools import takewhile
from typing import NamedTuple


class Recipe(NamedTuple):
    """At least two complete rows with different seeds, in seed order."""

    label: str
    rows: list[dict]

    def values(self, key: str) -> dict[int, float]:
        """{seed: value} of the rows that have a value for `key`."""
        return {row["seed"]: row[key] for row in self.rows if row[key] is not None}

    def over_seeds(self, key: str) -> list[float]:
        """The values without their seeds."""
        return list(self.values(key).values())

    def mean(self, key: str) -> float | None:
        """The mean over the seeds; None if no row has a value."""
        values = self.over_seeds(key)
        return sum(values) / len(values) if values else None


class Estimate(NamedTuple):
    """A mean over seeds, the half width of its confidence interval, and the number of seeds."""

    mean: float
    half_width: float
    seeds: int


def recipes(rows: list[dict]) -> list[Recipe]:
    """Group rows by `recipe` where it has at least two seeds; the recipe that trains all parameters comes first.

    If two rows share recipe and seed, the first one counts. The label is the common part of the stage names.
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
    """The common prefix of stage names, without a number at its end: top2 for top2_0 and top2_1."""
    common = takewhile(lambda letters: len(set(letters)) == 1, zip(*stages, strict=False))
    return re.sub(r"[-_. ]+\d*$", "", "".join(letters[0] for letters in common)) or stages[0]


def collapsed(rows: list[dict]) -> list[dict]:
    """The rows, with the rows of each recipe replaced by one row of means, e.g. "full x3" for three seeds."""
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
    """The rows that are not replicates."""
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
    from llm3.report.statistics import over_seeds

    if (found := over_seeds(values)) is None:
        return None
    return Estimate(found.value, found.high - found.value, found.pairs)

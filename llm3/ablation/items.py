"""The results of two variants item by item, so that their difference is paired by item too."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from llm3.ablation.metrics import evaluation_of
from llm3.ablation.study import Outcome
from llm3.report.entries import Measure, agree
from llm3.report.predictions import Columns


class Items(NamedTuple):
    """Scores of the items of an evaluation, for a variant at a seed, in the order of the items.

    documents: which items belong together. weights: None if each item counts once. All [items].
    """

    scores: np.ndarray
    documents: np.ndarray
    weights: np.ndarray | None

    def same_as(self, other: "Items") -> bool:
        """Whether documents and weights are the same."""
        if self.weights is None or other.weights is None:
            return self.weights is other.weights and np.array_equal(self.documents, other.documents)
        return np.array_equal(self.documents, other.documents) and np.array_equal(self.weights, other.weights)


class Paired(NamedTuple):
    """{seed: scores [items]} of both variants, and what their items have in common, as in `Items`."""

    ours: dict[int, np.ndarray]
    theirs: dict[int, np.ndarray]
    documents: np.ndarray
    weights: np.ndarray | None


def paired(ours: Mapping[int, Outcome], theirs: Mapping[int, Outcome], measure: Measure) -> Paired | None:
    """The scores of both variants at the same seeds; None if some were not kept, or are of other items."""
    first: Items | None = None
    sides: list[dict[int, np.ndarray]] = []
    for outcomes in (ours, theirs):
        sides.append({})
        for seed, outcome in outcomes.items():
            found = items_of(outcome.predictions(evaluation_of(measure)), measure, outcome.row[measure.key])
            first = first or found
            if found is None or first is None or not first.same_as(found):
                return None
            sides[-1][seed] = found.scores
    return None if first is None else Paired(sides[0], sides[1], first.documents, first.weights)


def items_of(columns: Columns | None, measure: Measure, value: float) -> Items | None:
    """The items of an evaluation; None unless their scores make up the value of the metric."""
    if columns is None or (scores := measure.values(columns)) is None:
        return None
    weights, order = measure.weights(columns), np.argsort(columns["item"], kind="stable")
    total = len(scores) if weights is None else weights.sum()
    if not total or not agree(scores.sum() / total, value):
        return None
    documents = np.asarray(columns["item"])[order]
    return Items(scores[order].astype(np.float64), documents, None if weights is None else weights[order])

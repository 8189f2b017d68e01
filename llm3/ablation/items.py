"""The results of two variants item by item, so that their difference is paired by item too."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from llm3.ablation.metrics import evaluation_of
from llm3.ablation.study import Outcome
from llm3.report.entries import Measure, agree


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


def paired(ours: Mapping[int, Items | None], theirs: Mapping[int, Items | None]) -> Paired | None:
    """The scores of both variants at the same seeds; None if some were not kept, or are of other items."""
    known = [each for each in (*ours.values(), *theirs.values()) if each is not None]
    if len(known) < len(ours) + len(theirs) or not all(each.same_as(known[0]) for each in known):
        return None
    first, second = ({seed: each.scores for seed, each in side.items() if each} for side in (ours, theirs))
    return Paired(first, second, known[0].documents, known[0].weights)


def items_of(outcome: Outcome, stage: str, measure: Measure) -> Items | None:
    """The items of the metric's evaluation of a stage; None unless they were kept and make up its value."""
    columns = outcome.predictions(evaluation_of(measure), stage)
    if columns is None or (scores := measure.values(columns)) is None:
        return None
    weights, order = measure.weights(columns), np.argsort(columns["item"], kind="stable")
    total = len(scores) if weights is None else weights.sum()
    if not total or not agree(scores.sum() / total, outcome.rows[stage][measure.key]):
        return None
    documents = np.asarray(columns["item"])[order]
    return Items(scores[order].astype(np.float64), documents, None if weights is None else weights[order])

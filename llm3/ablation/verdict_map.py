"""Verdicts over a grid of cells, and where they turn: the numbers behind a heat map of differences."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from llm3.ablation.power import ALPHA
from llm3.ablation.statistics import Effect
from llm3.ablation.verdicts import Claim, Verdict, verdicts

Cell = tuple[int, int]  # row, column


class VerdictMap(NamedTuple):
    """A grid of differences; arrays are [rows, columns]."""

    values: np.ndarray  # differences; NaN where a cell is missing
    shown: np.ndarray  # bool: is a difference shown, adjusted by Holm for all cells?
    words: np.ndarray  # str: the verdicts' words; "" where a cell is missing
    verdicts: dict[Cell, Verdict]
    turns: list[tuple[Cell, Cell]]  # neighbours, the upper or left one first, whose verdicts have different words


def verdict_map(effects: Sequence[Sequence[Effect | None]], claim: Claim, alpha: float = ALPHA) -> VerdictMap:
    """Judge one claim in every cell. effects [rows][columns]: None where a cell is missing; all cells are one family.

    Raises ValueError if rows have different lengths, UserError for a claim that cannot be judged.
    """
    if len({len(row) for row in effects}) > 1:
        raise ValueError(f"rows of {[len(row) for row in effects]} cells: expected equally many")
    shape = (len(effects), len(effects[0]) if effects else 0)
    present = {(r, c): found for r, row in enumerate(effects) for c, found in enumerate(row) if found is not None}
    judged = dict(zip(present, verdicts(list(present.values()), [claim] * len(present), alpha), strict=True))
    values, shown, words = np.full(shape, math.nan), np.zeros(shape, bool), np.full(shape, "", dtype="<U9")
    for cell, verdict in judged.items():
        values[cell], shown[cell], words[cell] = present[cell].value, bool(verdict.shown), verdict.word
    return VerdictMap(values, shown, words, judged, _turns(words))


def _turns(words: np.ndarray) -> list[tuple[Cell, Cell]]:
    """Neighbours in a row or a column with different words, both present."""
    cells = [(r, c) for r, c in np.ndindex(words.shape) if words[r, c]]
    pairs = [(cell, beside) for cell in cells for beside in ((cell[0], cell[1] + 1), (cell[0] + 1, cell[1]))]
    return [(one, other) for one, other in pairs if other in set(cells) and words[one] != words[other]]

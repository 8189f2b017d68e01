"""The arrays that every training step and evaluation reads, whatever the stage and the objective."""

from typing import Any, NamedTuple


class Batch(NamedTuple):
    """Windows of packed documents. All arrays are [batch, length] ([length] for one window).

    tokens: int32. positions: int32, from 0 in each document. segments: int32, 1, 2, ... for the documents of a
    window and 0 for padding. targets: int32, the token or class to predict at a position. weights: float32, the
    weight of a position in the loss; 0 where there is nothing to predict.
    """

    tokens: Any
    positions: Any
    segments: Any
    targets: Any
    weights: Any

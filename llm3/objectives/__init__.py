"""Objectives: the loss that a stage minimises. Each file here is a plugin, found by its name.

A plugin has
- `WINDOWS`: {row format: kind of windows}, see `llm3.data.formats` and `llm3.data.windows`;
- `HEAD`, the task head that it needs: "" (none), "labels" (one logit a class), or the names of its outputs;
- `LABELLED`: whether it needs labels;
- `CAUSAL`: the attention that it needs (None: either);
- `Options` (optional): a frozen dataclass;
- `loss(model, batch, key, task) -> Sums`. The step divides one global sum by the other, so gradients do not depend on
  how a batch is cut into micro-batches or over devices.

A config is checked against the constants and `Options` before jax is imported: they should need no more than the
standard library and `llm3.errors` (see `llm3.registry.declared`).

Optional constants and functions:

    PREFIX = True                          the loss gives the model a prefix, to which all queries attend

    corrupt(window, rng, task) -> Batch    random changes, on the host, of a window of `raw_length`; the result has
                                           task.length
    raw_length(task) -> int                the length of windows before `corrupt` (default: the stage's length)
    check_tokenizer(tokenizer, options)    raises UserError if the tokenizer lacks a token that the objective needs
    max_output_positions(task) -> int      max positions per window whose output the loss uses; the last layer is
                                           computed at these only
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from llm3.data.tokenizer import Tokenizer


class Sums(NamedTuple):
    """Float32 scalars: the sum of weighted losses in nats, the sum of weights, and weighted sums of further metrics."""

    loss: jax.Array
    weight: jax.Array
    metrics: dict[str, jax.Array]


class Task(NamedTuple):
    """The settings of an objective in a stage.

    options: an instance of its `Options`, or None. tokenizer: the tokenizer of the run. length: T of the stage's
    windows. label_sets: float32 [S, C], 1 for the classes in each label set, where a document may have several labels
    and a target is the number of a set; None: a target is a class.
    """

    options: Any
    tokenizer: Tokenizer
    length: int
    label_sets: np.ndarray | None = None

"""The weights of a stage's sources over its steps: temperature, phases, replay."""

from collections.abc import Mapping, Sequence
from typing import Any

from llm3.config.checks import check_phases
from llm3.data.mixture import Schedule, check_weights
from llm3.errors import UserError


def weight_schedule(
    *,
    data: Mapping[str, float],
    temperature: float,
    data_schedule: Sequence[Any],
    replay: float,
    parent: Mapping[str, float] | None,
    tokens: Mapping[str, int],
    steps: int,
    where: str,
) -> Schedule:
    """[(first step, {source: weight}), ...] of a stage of `steps` steps, the first at step 0.

    data: weights from step 0 on. data_schedule: [[step, {source: weight}], ...], weights that replace the earlier ones
    from each step on. tokens: {source: number of tokens}, for all sources.

    temperature t > 0 multiplies each weight by tokens ** (1 / t). With equal weights, t = 1 draws in proportion to
    size, and larger t is closer to equal shares (mBERT, Devlin 2019; XLM-R, Conneau et al. 2020, where 1 / t is alpha).

    replay r: in every phase, a share r is drawn from the parent's data, by the weights `parent`, and 1 - r from the
    stage's own data, as in continual pretraining (Ibrahim et al. 2024). A source in both gets the sum.

    Raises UserError, starting with `where` ("config.stages.NAME"), for an unknown source, a weight that is not
    positive, steps that do not ascend between 0 and `steps`, a source without tokens, and replay without a parent.
    """
    if replay and not parent:
        raise UserError(f"{where}.replay={replay}: needs a `start`: the data of its parent is replayed")
    phases = [(0, data), *check_phases(data_schedule, steps, f"{where}.data_schedule")]
    for step, weights in phases:
        check_weights(weights, tokens, f"{where}.data_schedule: step {step}" if step else f"{where}.data")
    if temperature:
        phases = [(step, _tempered(weights, temperature, tokens, where)) for step, weights in phases]
    if replay and parent:
        check_weights(parent, tokens, f"{where}.replay: the parent's data")
        phases = [(step, _with_replay(weights, parent, replay)) for step, weights in phases]
    return [(step, dict(weights)) for step, weights in phases]


def _tempered(
    weights: Mapping[str, float], temperature: float, tokens: Mapping[str, int], where: str
) -> dict[str, float]:
    for name in weights:
        if not tokens[name]:
            raise UserError(f"{where}.temperature: source {name!r} has no tokens")
    # relative to the largest, so that no power overflows
    most = max(tokens[name] for name in weights)
    return {name: weight * (tokens[name] / most) ** (1 / temperature) for name, weight in weights.items()}


def _with_replay(own: Mapping[str, float], parent: Mapping[str, float], share: float) -> dict[str, float]:
    mixed = {name: (1 - share) * weight / sum(own.values()) for name, weight in own.items()}
    for name, weight in parent.items():
        mixed[name] = mixed.get(name, 0.0) + share * weight / sum(parent.values())
    return mixed

"""The learning rate: schedules over updates, and factors by leaf."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llm3.errors import UserError, at_least, counted, nearest
from llm3.optim.partition import matcher, rule_names
from llm3.optim.precedence import deciding_rules, shadowed
from llm3.segments import locate
from llm3.tree import flatten


def _constant(progress: jax.Array, final: float) -> jax.Array:
    return jnp.ones_like(progress)


def _linear(progress: jax.Array, final: float) -> jax.Array:
    return 1 - (1 - final) * progress


def _cosine(progress: jax.Array, final: float) -> jax.Array:
    return 1 - (1 - final) * 0.5 * (1 - jnp.cos(jnp.pi * progress))


SHAPES = {"constant": _constant, "linear": _linear, "cosine": _cosine, "wsd": _linear}


def make_schedule(
    name: str,
    *,
    learning_rate: float,
    steps: int,
    warmup_steps: int = 0,
    decay_steps: int = 0,
    final_fraction: float = 0.1,
) -> optax.Schedule:
    """update (from 0) -> learning rate, float32 scalar: a linear warm-up, then the shape `name`.

    Update s of the warm-up has learning_rate * (s + 1) / warmup_steps: it is never 0, and ends at the peak.
    `constant` stays at the peak. `linear` and `cosine` (Loshchilov and Hutter 2017) decay to
    final_fraction * learning_rate at update steps - 1. `wsd` (warm-up, stable, decay: MiniCPM, Hu et al. 2024,
    arXiv:2404.06395, with a linear decay) stays at the peak and decays to it within the last `decay_steps` updates
    (0: a tenth of all). Later updates keep the last rate.

    Raises UserError for an unknown name, and for numbers that are negative or do not fit into `steps`.
    """
    if name not in SHAPES:
        raise UserError(f"optimizer.schedule={name!r}: {nearest(name, SHAPES)}")
    for field, value in (("learning_rate", learning_rate), ("warmup_steps", warmup_steps)):
        at_least(f"optimizer.{field}", value, 0)
    at_least("optimizer.decay_steps", decay_steps, 0)
    at_least("optimizer.final_fraction", final_fraction, 0)
    at_least("steps", steps, 1)
    if decay_steps and name != "wsd":
        raise UserError(f"optimizer.decay_steps={decay_steps} belongs to schedule='wsd'; this schedule is {name!r}")
    if name == "wsd":
        decay_steps = decay_steps or max(1, steps // 10)
    if warmup_steps + decay_steps > steps:
        decay = f" and a decay of {decay_steps}" if decay_steps else ""
        raise UserError(
            f"optimizer.warmup_steps={warmup_steps}{decay}: expected at most the {counted(steps, 'step')} of the stage"
        )
    at_peak = max(warmup_steps - 1, steps - 1 - decay_steps if name == "wsd" else 0, 0)
    falling = max(steps - 1 - at_peak, 0)

    def rate(count: jax.typing.ArrayLike) -> jax.Array:
        count = jnp.asarray(count, jnp.float32)
        warm = jnp.minimum((count + 1) / max(warmup_steps, 1), 1)
        progress = jnp.clip(count - at_peak, 0, falling) / max(falling, 1)
        return learning_rate * warm * SHAPES[name](progress, final_fraction)

    return rate


def rate_factors(
    params: dict, *, layers: int, layer_decay: float, learning_rates: list, later: Iterable[str] = ()
) -> dict[str, np.ndarray]:
    """{path: factor of the learning rate} for the segmented tree `params` (arrays or shapes), in float32.

    A leaf of layers a to b of the stack has one factor for each layer, [b - a, 1, ...]; any other leaf has a scalar.
    A factor is the product of two:
    - discriminative fine-tuning (Howard and Ruder 2018, ULMFiT, section 3.1), in the form of Clark et al. 2020
      (ELECTRA): layer_decay ** (layers - i) for layer i, counted from 0 at the bottom; layer_decay ** (layers + 1) for
      the embedding; 1 for the final norm and the heads;
    - the factor of the first [rule, factor] of `learning_rates` whose rule (see `partition`) matches the leaf in that
      layer, else 1.

    later: segmented paths of leaves that become trainable later, which rules may match as well. Raises UserError for a
    layer_decay outside (0, 1], for malformed pairs and rules, and for a rule that decides about no trainable parameter.
    """
    if not 0 < layer_decay <= 1:
        raise UserError(f"optimizer.layer_decay={layer_decay!r}: expected a number above 0, at most 1")
    rules = _rules(learning_rates, layers, {*flatten(params), *later})

    def one(name: str, layer: int | None) -> float:
        depth = layers - layer if layer is not None else layers + 1 if name.startswith("embed/") else 0
        return layer_decay**depth * next((factor for match, factor in rules if match(name, layer)), 1.0)

    def of_leaf(path: str, rank: int) -> np.ndarray:
        name, within = locate(path)
        shape = () if within is None else (len(within), *(1,) * (rank - 1))
        return np.asarray([one(name, layer) for layer in within or [None]], np.float32).reshape(shape)

    return {path: of_leaf(path, len(leaf.shape)) for path, leaf in flatten(params).items()}


def _rules(learning_rates: Any, layers: int, paths: set[str]) -> list[tuple[Callable, float]]:
    """(matcher, factor) of each pair. Each rule must decide about some of the segmented `paths`."""
    where = "optimizer.learning_rates"
    if not isinstance(learning_rates, list | tuple):
        raise UserError(f"{where}={learning_rates!r}: expected a list of [rule, factor] pairs")
    leaves, rules = [locate(path) for path in sorted(paths)], []
    for i, pair in enumerate(learning_rates):
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            raise UserError(f"{where}[{i}]={pair!r}: expected [rule, factor], as in ['embeddings', 0.1]")
        rule, factor = pair
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < np.inf:
            raise UserError(f"{where}[{i}]={pair!r}: expected a factor above 0 (to freeze, use `train`)")
        if rule.strip().startswith("not "):
            raise UserError(f"{where}[{i}]={pair!r}: 'not' has no factor; the first rule that matches a leaf decides")
        try:
            match = matcher(rule, layers)
        except UserError as error:
            raise UserError(f"{where}[{i}]: {error}") from None
        rules.append((match, float(factor)))
    each_layer = [(name, layer) for name, within in leaves for layer in within or [None]]
    deciding = deciding_rules([match for match, _ in rules], each_layer)
    for i, (rule, _) in enumerate(learning_rates):
        if not deciding.matched[i]:
            valid = rule_names(sorted({name for name, _ in leaves}))
            raise UserError(f"{where}[{i}]: rule {rule!r} matches nothing trainable; {nearest(rule, valid)}")
        if hidden := deciding.hidden_by(i):
            raise UserError(f"{where}[{i}]: {shadowed(rule, [learning_rates[each][0] for each in hidden])}")
    return rules

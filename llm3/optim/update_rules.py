"""The optax update rules by name, at a learning rate of 1, for trees with stacked layers.

muon (Jordan et al. 2024) orthogonalises the kernels of each layer as matrices [D, heads x head_dim] and uses Adam for
all other leaves; its option adam_learning_rate is a peak rate. adafactor (Shazeer and Stern 2018) factors the matrices
of each layer whose sides both have at least min_dim_size_to_factor.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
import optax

from llm3.errors import at_least
from llm3.optim.muon import muon
from llm3.segments import in_stack
from llm3.tree import flatten, unflatten


def _matrix_axes(path: str, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """(input axes, output axes) of a stacked kernel; None if the leaf is not one matrix per layer.

    [L, D, heads, head_dim] maps D to heads x head_dim; the kernel of `out`, [L, heads, head_dim, D], maps them back.
    """
    names = path.split("/")
    if not in_stack(path) or names[-1] != "kernel" or rank < 3:
        return None
    first_output = rank - 1 if names[-2] == "out" else 2
    return tuple(range(1, first_output)), tuple(range(first_output, rank))


def _per_layer(path: str, leaf: jax.Array) -> jax.Array:
    """A stacked kernel as [L, in, out], another stacked leaf as [L, n]; a leaf outside the stack does not change."""
    if not in_stack(path):
        return leaf
    axes = _matrix_axes(path, leaf.ndim)
    if axes is None:
        return leaf.reshape(leaf.shape[0], -1)
    return leaf.reshape(leaf.shape[0], int(np.prod([leaf.shape[axis] for axis in axes[0]])), -1)


def _layer_by_layer(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """Apply a rule to each layer of a stacked leaf separately, with kernels as matrices.

    An update then does not depend on how layers are stacked or cut into segments.
    """

    def mapped(path: str, function: Callable) -> Callable:
        return jax.vmap(function) if in_stack(path) else function

    def init(params: dict) -> dict:
        return {path: mapped(path, rule.init)(_per_layer(path, leaf)) for path, leaf in flatten(params).items()}

    def update(gradients: dict, state: dict, params: dict | None = None) -> tuple[dict, dict]:
        assert params is not None  # every optimizer passes them
        flat_params, updates, new_state = flatten(params), {}, {}
        for path, gradient in flatten(gradients).items():
            views = _per_layer(path, gradient), state[path], _per_layer(path, flat_params[path])
            change, new_state[path] = mapped(path, rule.update)(*views)
            updates[path] = change.reshape(gradient.shape)
        return unflatten(updates), new_state

    return optax.GradientTransformation(init, update)


def _adamw(params: dict, peak: float, options: dict) -> optax.GradientTransformation:
    return optax.adam(1.0, **options)


def _adafactor(params: dict, peak: float, options: dict) -> optax.GradientTransformation:
    # optax factors the two largest axes of a leaf, and clips and scales by the norm of a leaf: on a stack, this would
    # mix layers, heads and head_dim
    return _layer_by_layer(optax.adafactor(None, **options))


def _lion(params: dict, peak: float, options: dict) -> optax.GradientTransformation:
    return optax.lion(1.0, weight_decay=0.0, **options)


def _muon(params: dict, peak: float, options: dict) -> optax.GradientTransformation:
    if "adam_learning_rate" in options:  # a peak rate, on the same schedule
        at_least("optimizer.options.adam_learning_rate", options["adam_learning_rate"], 0)
        options = options | {"adam_learning_rate": options["adam_learning_rate"] / peak if peak else 0.0}
    axes = {path: _matrix_axes(path, len(leaf.shape)) for path, leaf in flatten(params).items()}
    return muon(params, {path: each for path, each in axes.items() if each}, options)


def _sgd(params: dict, peak: float, options: dict) -> optax.GradientTransformation:
    return optax.sgd(1.0, **options)


class Build(Protocol):
    """The type of the functions that build a rule."""

    def __call__(self, params: dict, peak: float, options: dict) -> optax.GradientTransformation: ...


class Rule(NamedTuple):
    """build(params, peak learning rate, options) -> the rule at a learning rate of 1. options: the optax function."""

    build: Build
    options: Callable


RULES = {
    "adamw": Rule(_adamw, optax.adam),
    "adafactor": Rule(_adafactor, optax.adafactor),
    "lion": Rule(_lion, optax.lion),
    "muon": Rule(_muon, optax.contrib.muon),
    "sgd": Rule(_sgd, optax.sgd),
}


def by_phase(
    build: Callable[[dict], optax.GradientTransformation], params: dict, groups: Mapping[str, int]
) -> optax.GradientTransformation:
    """A separate instance of a rule for the leaves of each phase, which counts the updates of these leaves only.

    build(tree) -> the rule for the leaves of that tree. groups: {path: phase} for every leaf of `params` (arrays or
    shapes). The state is {str(phase): state of the rule}; the state of one phase does not depend on other phases.
    """

    def divide(tree: dict) -> dict[str, dict]:
        parts: dict[str, dict] = {}
        for path, leaf in flatten(tree).items():
            parts.setdefault(str(groups[path]), {})[path] = leaf
        return {phase: unflatten(part) for phase, part in parts.items()}

    rules = {phase: build(part) for phase, part in divide(params).items()}

    def init(params: dict) -> dict:
        return {phase: rules[phase].init(part) for phase, part in divide(params).items()}

    def update(gradients: dict, state: dict, params: dict) -> tuple[dict, dict]:
        values, new_state = divide(params), {}
        updates: dict[str, Any] = {}
        for phase, part in divide(gradients).items():
            change, new_state[phase] = rules[phase].update(part, state[phase], values[phase])
            updates |= flatten(change)
        return unflatten(updates), new_state

    return optax.GradientTransformation(init, update)

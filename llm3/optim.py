"""Learning-rate schedules and optimizers, each by name, with masks by the path of a leaf.

Every optimizer is the same chain: clip by the global norm of the trainable tree, the update rule of optax at a learning
rate of 1, decoupled weight decay (Loshchilov and Hutter 2019, as in optax: times the learning rate), the schedule. The
step of the schedule is counted in the optimizer's state: a step that keeps the old state keeps its place as well.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llm3.config import at_least
from llm3.errors import UserError, nearest
from llm3.tree import flatten, map_with_path, unflatten

DECAYED = ("kernel", "embedding")  # the leaves, by their last name, that weight decay applies to
STACKED = "layers"  # leaves below this name have a leading layer axis


class Optimizer(NamedTuple):
    """transform: for the trainable tree. schedule: update (from 0) -> learning rate, float32 scalar."""

    transform: optax.GradientTransformation
    schedule: optax.Schedule


def _constant(progress: jax.Array, final: float) -> jax.Array:
    return jnp.ones_like(progress)


def _linear(progress: jax.Array, final: float) -> jax.Array:
    return 1 - (1 - final) * progress


def _cosine(progress: jax.Array, final: float) -> jax.Array:
    return 1 - (1 - final) * 0.5 * (1 - jnp.cos(jnp.pi * progress))


SHAPES = {"constant": _constant, "linear": _linear, "cosine": _cosine, "wsd": _linear}


def schedule(
    name: str,
    *,
    learning_rate: float,
    steps: int,
    warmup_steps: int = 0,
    decay_steps: int = 0,
    final_fraction: float = 0.1,
) -> optax.Schedule:
    """update (from 0) -> learning rate, float32 scalar: a linear warm-up, then the shape that `name` says.

    Update s of the warm-up has learning_rate * (s + 1) / warmup_steps: never 0, and the last one has the peak.
    `constant` stays there. `linear` and `cosine` (Loshchilov and Hutter 2017) then reach
    final_fraction * learning_rate at update steps - 1. `wsd` (warm-up, stable, decay: MiniCPM, Hu et al. 2024,
    arXiv:2404.06395, with a linear decay) stays at the peak and does the same within the last `decay_steps` updates
    (0: a tenth of all). Updates after the last one stay where it was.

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
        raise UserError(f"optimizer.decay_steps={decay_steps} belongs to schedule='wsd'; here it is {name!r}")
    if name == "wsd":
        decay_steps = decay_steps or max(1, steps // 10)
    if warmup_steps + decay_steps > steps:
        decay = f" and a decay of {decay_steps}" if decay_steps else ""
        raise UserError(
            f"optimizer.warmup_steps={warmup_steps}{decay}: expected at most the {steps} steps of the stage"
        )
    at_peak = max(warmup_steps - 1, steps - 1 - decay_steps if name == "wsd" else 0, 0)
    falling = max(steps - 1 - at_peak, 0)

    def rate(count: jax.typing.ArrayLike) -> jax.Array:
        count = jnp.asarray(count, jnp.float32)
        warm = jnp.minimum((count + 1) / max(warmup_steps, 1), 1)
        progress = jnp.clip(count - at_peak, 0, falling) / max(falling, 1)
        return learning_rate * warm * SHAPES[name](progress, final_fraction)

    return rate


_schedule = schedule  # `make` has a parameter of that name


def _matrix_axes(path: str, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The input axes and the output axes of a stacked kernel; None for a leaf that is no matrix per layer.

    [L, D, heads, head_dim] maps D to heads x head_dim; the kernel of `out`, [L, heads, head_dim, D], the other way.
    """
    names = path.split("/")
    if names[0] != STACKED or names[-1] != "kernel" or rank < 3:
        return None
    first_output = rank - 1 if names[-2] == "out" else 2
    return tuple(range(1, first_output)), tuple(range(first_output, rank))


def _per_layer(path: str, leaf: jax.Array) -> jax.Array:
    """[L, in, out] of a stacked kernel and [L, n] of another stacked leaf; a leaf outside the stack as it is."""
    if path.split("/")[0] != STACKED:
        return leaf
    axes = _matrix_axes(path, leaf.ndim)
    if axes is None:
        return leaf.reshape(leaf.shape[0], -1)
    return leaf.reshape(leaf.shape[0], int(np.prod([leaf.shape[axis] for axis in axes[0]])), -1)


def _layer_by_layer(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """Apply a rule that looks at whole leaves to each layer of a stacked leaf alone, its kernels as matrices.

    So an update does not depend on how the layers are stacked or cut into segments.
    """

    def mapped(path: str, function: Callable) -> Callable:
        return jax.vmap(function) if path.split("/")[0] == STACKED else function

    def init(params: dict) -> dict:
        return {path: mapped(path, rule.init)(_per_layer(path, leaf)) for path, leaf in flatten(params).items()}

    def update(gradients: dict, state: dict, params: dict | None = None) -> tuple[dict, dict]:
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
    # optax factors the two largest axes of a leaf, and clips and scales by norms of a whole leaf: on a stack these
    # would mix layers, heads and head_dim
    return _layer_by_layer(optax.adafactor(None, **options))


def _lion(params: dict, peak: float, options: dict) -> optax.GradientTransformation:
    return optax.lion(1.0, weight_decay=0.0, **options)


def _muon(params: dict, peak: float, options: dict) -> optax.GradientTransformation:
    def dimensions(path: str, leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
        axes = _matrix_axes(path, len(leaf.shape))
        return axes and optax.contrib.MuonDimensionNumbers(*axes)

    if "adam_learning_rate" in options:  # a peak, which follows the same schedule
        at_least("optimizer.options.adam_learning_rate", options["adam_learning_rate"], 0)
        options = options | {"adam_learning_rate": options["adam_learning_rate"] / peak if peak else 0.0}
    by_leaf = map_with_path(dimensions, params)
    return optax.contrib.muon(1.0, muon_weight_dimension_numbers=by_leaf, **options)


def _sgd(params: dict, peak: float, options: dict) -> optax.GradientTransformation:
    return optax.sgd(1.0, **options)


class Rule(NamedTuple):
    """build(params, peak learning rate, options) -> the rule at a learning rate of 1; options: whose they are."""

    build: Callable[[dict, float, dict], optax.GradientTransformation]
    options: Callable


RULES = {
    "adamw": Rule(_adamw, optax.adam),
    "adafactor": Rule(_adafactor, optax.adafactor),
    "lion": Rule(_lion, optax.lion),
    "muon": Rule(_muon, optax.contrib.muon),
    "sgd": Rule(_sgd, optax.sgd),
}
# set for every optimizer alike, hence no options of one
MANAGED = {"learning_rate", "mask", "weight_decay", "weight_decay_rate", "weight_decay_mask", "adam_weight_decay"}
MANAGED |= {"muon_weight_dimension_numbers"}


def make(
    params_example: dict,
    *,
    name: str,
    learning_rate: float,
    schedule: str,
    steps: int,
    warmup_steps: int,
    decay_steps: int,
    final_fraction: float,
    weight_decay: float,
    clip_norm: float,
    options: Mapping[str, Any],
) -> Optimizer:
    """The optimizer `name` for trees like `params_example` (the trainable tree: arrays or shapes; others are absent).

    clip_norm: of the global norm of the gradients of that tree; 0: none. weight_decay: only on leaves named kernel or
    embedding. options: go to the optax function as they are. muon (Jordan et al. 2024) orthogonalises each layer's
    kernels as matrices [D, heads x head_dim] and leaves embeddings, heads, norms and biases to Adam; its option
    adam_learning_rate is a peak as well. adafactor (Shazeer and Stern 2018) factors each layer's matrix, if both its
    sides have at least min_dim_size_to_factor.

    Raises UserError for an unknown optimizer, schedule or option, and for numbers out of range.
    """
    if name not in RULES:
        raise UserError(f"optimizer.name={name!r}: {nearest(name, RULES)}")
    at_least("optimizer.weight_decay", weight_decay, 0)
    at_least("optimizer.clip_norm", clip_norm, 0)
    valid = set(inspect.signature(RULES[name].options).parameters) - MANAGED
    for option in options:
        if option not in valid:
            raise UserError(f"optimizer.options.{option} is no option of {name}: {nearest(option, valid)}")
    rate = _schedule(
        schedule,
        learning_rate=learning_rate,
        steps=steps,
        warmup_steps=warmup_steps,
        decay_steps=decay_steps,
        final_fraction=final_fraction,
    )
    decayed = map_with_path(lambda path, _: path.split("/")[-1] in DECAYED, params_example)
    transform = optax.chain(
        optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
        RULES[name].build(params_example, learning_rate, dict(options)),
        optax.add_decayed_weights(-weight_decay, mask=decayed),
        optax.scale_by_learning_rate(rate, flip_sign=False),
    )
    return Optimizer(transform, rate)


def state_shardings(state: Any, params: dict, shardings: dict, replicated: Any) -> Any:
    """The sharding of every leaf of an optimizer's state (arrays or shapes).

    A leaf below the path of a parameter and of its shape (a moment) takes that parameter's sharding; counts and
    factored moments, which are small, are `replicated`. (`optax.tree.map_params` knows neither masks by leaf nor
    factors.)
    """
    shapes, by_path = {path: leaf.shape for path, leaf in flatten(params).items()}, flatten(shardings)

    def one(keys: tuple, leaf: Any) -> Any:
        names = [str(key.key) for key in keys if isinstance(key, jax.tree_util.DictKey)]
        suffixes = ("/".join(names[start:]) for start in range(len(names)))
        return next((by_path[path] for path in suffixes if shapes.get(path) == leaf.shape), replicated)

    return jax.tree_util.tree_map_with_path(one, state)


def state_bytes(tree: Any) -> int:
    """The bytes of all arrays (or shapes) of a tree, e.g. of an optimizer's state."""
    return sum(int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))

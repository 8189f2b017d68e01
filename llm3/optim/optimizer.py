"""The optimizer of a stage: clipping, update rule, weight decay, learning rates, L2-SP and weight averaging.

Every optimizer is the same chain: L2-SP, clipping by the global norm of the trainable tree, the optax update rule at a
learning rate of 1, decoupled weight decay (Loshchilov and Hutter 2019, as in optax: times the learning rate), a factor
for each leaf, the schedule, the running mean of the weights. Parts that are off are not in the chain.

Everything that changes is in the optimizer's state, including the step of the schedule. A skipped update keeps the old
state, and so its place in the schedule.
"""

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llm3.config.checks import check_moments
from llm3.errors import UserError, at_least, nearest
from llm3.optim.frozen import fitting
from llm3.optim.learning_rates import make_schedule, rate_factors
from llm3.optim.moments import low_moments
from llm3.optim.update_rules import RULES, by_phase
from llm3.tree import flatten, map_with_path, unflatten

# Last path components of leaves with weight decay. Learned positions and token types have none: rows that no document
# reaches get no gradient, so decay would be all that happens to them.
DECAYED = ("kernel", "embedding", "a", "b")
# arguments of optax that llm3 sets itself, so they are no options
MANAGED = {"learning_rate", "mask", "weight_decay", "weight_decay_rate", "weight_decay_mask", "adam_weight_decay"}
MANAGED |= {"muon_weight_dimension_numbers"}


class Optimizer(NamedTuple):
    """transform: updates the trainable tree. schedule: update (from 0) -> learning rate, float32 scalar."""

    transform: optax.GradientTransformation
    schedule: optax.Schedule


def make_optimizer(
    params_example: dict,
    *,
    layers: int,
    fresh: frozenset[str],
    groups: Mapping[str, int] | None,
    name: str,
    learning_rate: float,
    schedule: str,
    weight_decay: float,
    clip_norm: float,
    layer_decay: float,
    learning_rates: list,
    l2_sp: float,
    ema: float,
    moments: str,
    options: Mapping[str, Any],
    **shape: Any,
) -> Optimizer:
    """The optimizer `name` for trees like `params_example`, the trainable tree (of arrays or shapes).

    layers: the number of layers of the model. fresh: the segmented paths whose values come from no parent. groups:
    {segmented path: phase in which it becomes trainable} for every leaf of `params_example` and those of later phases.
    The leaves of each phase have their own instance of the update rule, whose count starts with them; the rest of the
    chain is shared. None: there is one phase.

    clip_norm: max global norm of the gradients; 0: off. weight_decay: for leaves named in `DECAYED`. layer_decay,
    learning_rates: factors of the learning rate, and so of the weight decay (`rate_factors`). l2_sp: see
    `pull_to_start`. ema: see `running_mean`. moments: float32, or a kind of `low_moments`. options: of the optax
    function (`update_rules`). shape: of the schedule, and its steps (`make_schedule`).

    Raises UserError for an unknown optimizer, schedule, option or rule, and for numbers out of range.
    """
    leaves = {*flatten(params_example), *(groups or ())}
    check_moments(name, moments, options, "optimizer")
    _check(name, options, leaves - fresh, weight_decay=weight_decay, clip_norm=clip_norm, l2_sp=l2_sp, ema=ema)
    rate = make_schedule(schedule, learning_rate=learning_rate, **shape)
    factors = rate_factors(
        params_example, layers=layers, layer_decay=layer_decay, learning_rates=learning_rates, later=groups or ()
    )

    def build(params: dict) -> optax.GradientTransformation:
        rule = RULES[name].build(params, peak=learning_rate, options=dict(options))
        return rule if moments == "float32" else low_moments(rule, moments)

    decayed = map_with_path(lambda path, _: path.split("/")[-1] in DECAYED, params_example)
    transform = optax.chain(
        *([pull_to_start(l2_sp, fresh)] if l2_sp else []),
        optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
        build(params_example) if groups is None else by_phase(build, params_example, groups),
        optax.add_decayed_weights(-weight_decay, mask=decayed),
        *([scale_by_leaf(factors)] if layer_decay != 1 or any(factor != 1 for _, factor in learning_rates) else []),
        optax.scale_by_learning_rate(rate, flip_sign=False),
        *([running_mean(ema, groups)] if ema else []),
    )
    return Optimizer(transform, jax.jit(rate))  # it is called to log it: one program, not one for each operation


def _check(
    name: str, options: Mapping[str, Any], from_parent: set[str], *, ema: float, l2_sp: float, **at_least_0: float
) -> None:
    """Raise UserError for numbers and options that do not fit. from_parent: trainable leaves with a parent's values."""
    if name not in RULES:
        raise UserError(f"optimizer.name={name!r}: {nearest(name, RULES)}")
    for field, value in {**at_least_0, "l2_sp": l2_sp}.items():
        at_least(f"optimizer.{field}", value, 0)
    if not 0 <= ema < 1:
        raise UserError(f"optimizer.ema={ema!r}: expected a decay from 0 up to 1, without 1")
    if l2_sp and not from_parent:
        raise UserError(f"optimizer.l2_sp={l2_sp!r}: no trainable parameter comes from a parent")
    valid = set(inspect.signature(RULES[name].options).parameters) - MANAGED
    for option in options:
        if option not in valid:
            raise UserError(f"optimizer.options.{option} is no option of {name}: {nearest(option, valid)}")


def scale_by_leaf(factors: Mapping[str, np.ndarray]) -> optax.GradientTransformation:
    """Multiply the update of each leaf by the factor at its path, broadcast."""
    scaled = lambda path, update: update * jnp.asarray(factors[path], update.dtype)  # noqa: E731
    return optax.stateless(lambda updates, params: map_with_path(scaled, updates))


class StartState(NamedTuple):
    """start: the initial values of the leaves that are pulled to them, a part of the trainable tree."""

    start: dict


def pull_to_start(strength: float, fresh: frozenset[str]) -> optax.GradientTransformation:
    """Add strength * (w - w0) to the gradient of every leaf that is not `fresh`; w0 is its value at `init`.

    That is the gradient of strength / 2 * ||w - w0||^2: L2-SP, Li, Grandvalet and Davoine 2018, "Explicit Inductive
    Bias for Transfer Learning with Convolutional Networks", equation 2.
    """

    def init(params: dict) -> StartState:
        # a copy: a step donates both the weights and this state, and must not donate a buffer twice
        held = {path: jnp.array(leaf, copy=True) for path, leaf in flatten(params).items() if path not in fresh}
        return StartState(unflatten(held))

    def update(gradients: dict, state: StartState, params: dict) -> tuple[dict, StartState]:
        values, pulled = flatten(params), flatten(gradients)
        for path, start in flatten(state.start).items():
            pulled[path] += strength * (values[path] - start)
        return unflatten(pulled), state

    return optax.GradientTransformation(init, update)


class EmaState(NamedTuple):
    """average: the running mean of the trainable tree, float32. counts: {str(phase): int32, updates of its leaves}."""

    average: dict
    counts: dict[str, jax.Array]


def running_mean(decay: float, groups: Mapping[str, int] | None = None) -> optax.GradientTransformation:
    """Keep average = d * average + (1 - d) * new weights after each update, from the weights of `init` on.

    d = min(decay, (1 + t) / (10 + t)) after t updates of a leaf, as in TensorFlow's ExponentialMovingAverage: the
    average forgets its start, however few updates follow. groups: as in `make_optimizer`; the leaves of each phase
    count their own updates.

    Averaging of the iterates (Polyak and Juditsky 1992) with exponential weights (Tarvainen and Valpola 2017, "Mean
    teachers", section 2). It is the last of the chain, so it gets the update that is applied.
    """

    def phase(path: str) -> str:
        return str(groups[path]) if groups else "0"

    def init(params: dict) -> EmaState:
        counts = {phase(path): jnp.zeros((), jnp.int32) for path in flatten(params)}
        return EmaState(jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), params), counts)

    def update(updates: dict, state: EmaState, params: dict) -> tuple[dict, EmaState]:
        new = flatten(optax.apply_updates(params, updates))
        decays = {each: jnp.minimum(decay, (1 + t) / (10 + t)) for each, t in state.counts.items()}

        def mean(path: str, old: jax.Array) -> jax.Array:
            d = decays[phase(path)]
            return d * old + (1 - d) * new[path].astype(jnp.float32)

        counts = {each: t + 1 for each, t in state.counts.items()}
        return updates, EmaState(map_with_path(mean, state.average), counts)

    return optax.GradientTransformation(init, update)


def averaged(opt_state: Any) -> dict | None:
    """The running mean of the trainable tree in a state (of arrays, shapes or shardings); None if there is none."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, EmaState))
    return next((node.average for node in nodes if isinstance(node, EmaState)), None)


def carry_state(old_state: Any, new_state: Any) -> Any:
    """`new_state` with the values of `old_state`. new_state: made with the same settings for a superset of the leaves.

    For gradual unfreezing (Howard and Ruder 2018, ULMFiT, section 3.3): the state of earlier leaves and the schedule
    continue; new leaves start fresh. Raises ValueError if a leaf of the old state has no counterpart in the new one.
    """
    old = {jax.tree_util.keystr(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(old_state)}
    carried = set()

    def one(keys: tuple, leaf: Any) -> Any:
        path = jax.tree_util.keystr(keys)
        if path not in old or old[path].shape != leaf.shape:
            return leaf
        carried.add(path)
        return old[path]

    state = jax.tree_util.tree_map_with_path(one, new_state)
    if lost := sorted(set(old) - carried):
        raise ValueError(f"the new optimizer's state has no leaf of the same path and shape for {', '.join(lost)}")
    return state


def state_shardings(state: Any, params: dict, shardings: dict, replicated: Any) -> Any:
    """The sharding of every leaf of an optimizer's state (arrays or shapes).

    A leaf with the path and the shape of a parameter (a moment) has the sharding of that parameter, and the scales of a
    moment in blocks have it as far as it divides them. Counts and factored moments are small, and `replicated`.
    (`optax.tree.map_params` supports neither masks by leaf nor factored moments.)
    """
    shapes, by_path = {path: leaf.shape for path, leaf in flatten(params).items()}, flatten(shardings)

    def one(keys: tuple, leaf: Any) -> Any:
        names = [str(key.key) for key in keys if isinstance(key, jax.tree_util.DictKey)]
        suffixes = ["/".join(names[start:]) for start in range(len(names))]
        if any(getattr(key, "name", "") == "scales" for key in keys):
            return next(fitting(by_path[path], leaf.shape) for path in suffixes if path in shapes)
        return next((by_path[path] for path in suffixes if shapes.get(path) == leaf.shape), replicated)

    return jax.tree_util.tree_map_with_path(one, state)


def state_bytes(tree: Any) -> int:
    """The bytes of all arrays (or shapes) of a tree, e.g. of an optimizer's state."""
    return sum(int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))

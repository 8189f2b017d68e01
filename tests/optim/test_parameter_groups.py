"""Rates of leaves, the pull toward the parent, the mean of the weights, and leaves that join later."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llm3.errors import UserError
from llm3.optim.optimizer import averaged, carry_state, running_mean, state_bytes, state_shardings
from llm3.segments import canonical
from llm3.tree import flatten, map_with_path, unflatten
from tests.helpers.tiny_optim import NAMES, L, adamw_in_float64, cut, expected_rate, make, step_of, train, tree

ALL_AT_ONCE = {
    "layer_decay": 0.7,
    "learning_rates": [["layers[1:]/mlp/.*", 2.0], ["norms", 0.5]],
    "l2_sp": 0.3,
    "ema": 0.9,
    "clip_norm": 3.0,
    "weight_decay": 0.1,
}
OPTIMIZERS = [name if name in ("adamw", "muon") else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
STEADY = {"schedule": "constant", "warmup_steps": 0}


def assert_trees_close(actual: dict, expected: dict, rtol: float = 1e-6, atol: float = 1e-7) -> None:
    assert set(flatten(actual)) == set(flatten(expected))
    for path, leaf in flatten(actual).items():
        np.testing.assert_allclose(leaf, flatten(expected)[path], rtol=rtol, atol=atol, err_msg=path)


def of(params: dict, *parts: str) -> dict:
    """The leaves whose path starts with one of `parts`."""
    return unflatten({path: leaf for path, leaf in flatten(params).items() if path.startswith(parts)})


def small(seed: int) -> dict:
    """Fewer leaves, which compile more quickly."""
    return of(tree(seed), "final_norm", "head/kernel", "layers/0:3/attention/query/kernel", "layers/0:3/mlp")


def by_layer(path: str, values: dict) -> np.ndarray:
    """The entry of `values` for a leaf, where a leaf of the stack has one for each of its layers."""
    top, segment = path.split("/")[:2]
    if top != "layers":
        return np.asarray(values[top])
    first, last = map(int, segment.split(":"))
    ranks = {"scale": 1, "bias": 2}.get(path.split("/")[-1], 2 if "mlp" in path else 3)
    return np.asarray(values[top][first:last]).reshape(-1, *[1] * ranks)


def test_layer_decay_halves_the_rate_and_the_weight_decay_of_each_layer_below_the_top():
    params, gradient = (cut(tree(seed), (0, 1), (1, 3)) for seed in (0, 1))
    optimizer = make(params, name="sgd", layer_decay=0.5, weight_decay=0.2, **STEADY)
    trained, _ = train(optimizer, params, [gradient])
    rates = {"embed": 0.01 / 16, "layers": [0.01 / 8, 0.01 / 4, 0.01 / 2], "final_norm": 0.01, "head": 0.01}
    for path, leaf in flatten(trained).items():
        before, slope = flatten(params)[path], flatten(gradient)[path]
        decay = 0.2 if path.endswith(("kernel", "embedding")) else 0.0
        expected = before - by_layer(path, rates) * (slope + decay * before)
        np.testing.assert_allclose(leaf, expected, rtol=1e-6, atol=1e-7, err_msg=path)


def test_layer_decay_counts_the_layers_of_the_whole_model_where_only_some_train():
    top = tree(0, segment="2:3/", layers=slice(2, 3))
    trained, _ = train(make(top, name="sgd", layer_decay=0.5, layers=6, **STEADY), top, [top])
    before, after = flatten(top), flatten(trained)
    np.testing.assert_allclose(after["embed/embedding"], (1 - 0.01 / 2**7) * before["embed/embedding"], rtol=1e-6)
    np.testing.assert_allclose(
        after["layers/2:3/mlp/up/kernel"], (1 - 0.01 / 2**4) * before["layers/2:3/mlp/up/kernel"], rtol=1e-6
    )


def test_the_first_rule_that_matches_a_leaf_in_a_layer_sets_its_factor_beside_that_of_its_layer():
    params = cut(tree(0), (0, 2), (2, 3))
    rules = [["layers[1]/attention/.*", 3.0], ["layers/attention/.*", 0.25], ["biases", 7], ["embed/.*", 2.0]]
    optimizer = make(params, name="sgd", layer_decay=0.5, learning_rates=rules, **STEADY)
    trained, _ = train(optimizer, params, [jax.tree.map(jnp.ones_like, params)])
    attention, mlp = [0.25 / 8, 3 / 4, 0.25 / 2], [1 / 8, 1 / 4, 1 / 2]
    others = {"embed/embedding": 2 / 16, "final_norm/scale": 1, "head/bias": 7, "head/kernel": 1}
    for path, leaf in flatten(trained).items():
        layers = {"layers": attention if "attention" in path else mlp}
        factor = others[path] if path in others else by_layer(path, layers)
        np.testing.assert_allclose(leaf, flatten(params)[path] - 0.01 * factor, rtol=1e-6, atol=1e-7, err_msg=path)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_cuts_of_the_stack_and_the_groups_of_leaves_that_start_together_change_nothing(name):
    whole, gradients = small(0), [small(1), small(2)]
    parts, cut_gradients = cut(whole, (0, 2), (2, 3)), [cut(each, (0, 2), (2, 3)) for each in gradients]
    groups = {path: 40 if path.startswith(("head", "layers/2:3")) else 0 for path in flatten(parts)}
    trained, state = train(make(whole, name=name, **ALL_AT_ONCE), whole, gradients)
    by_parts, by_parts_state = train(make(parts, name=name, groups=groups, **ALL_AT_ONCE), parts, cut_gradients)
    close = {"rtol": 1e-4, "atol": 2e-6}  # muon's iteration and norms, in another order
    assert_trees_close(canonical(by_parts), canonical(trained), **close)
    assert_trees_close(canonical(averaged(by_parts_state)), canonical(averaged(state)), **close)


@pytest.mark.parametrize("name", ["adafactor", "lion", "muon"])
def test_a_factor_multiplies_the_whole_update_of_a_layer_whatever_the_optimizer(name):
    params, gradient = (of(small(seed), "layers", "final_norm") for seed in (0, 1))
    plain, _ = train(make(params, name=name, weight_decay=0.2, **STEADY), params, [gradient])
    scaled, _ = train(make(params, name=name, weight_decay=0.2, layer_decay=0.5, **STEADY), params, [gradient])
    factors = {"layers": [1 / 8, 1 / 4, 1 / 2], "final_norm": 1}
    for path, before in flatten(params).items():
        expected = before + by_layer(path, factors) * (flatten(plain)[path] - before)
        np.testing.assert_allclose(flatten(scaled)[path], expected, rtol=1e-5, atol=1e-6, err_msg=path)


def test_l2_sp_pulls_all_but_fresh_leaves_to_where_they_started_and_counts_in_the_clipped_norm():
    params, gradients = tree(0), [tree(seed, scale=seed) for seed in (1, 2, 3)]
    fresh = frozenset({"head/kernel", "head/bias"})
    settings = {"learning_rate": 0.5, "weight_decay": 0.1, "clip_norm": 2.0, "options": {"b2": 0.95}, **STEADY}
    trained, state = train(make(params, l2_sp=1.5, fresh=fresh, **settings), params, gradients)
    pull = {path: 1.5 for path in flatten(params) if path not in fresh}
    expected = adamw_in_float64(params, gradients, [0.5] * 3, 0.1, 2.0, 0.9, 0.95, 1e-8, pull)
    assert_trees_close(trained, unflatten(expected), rtol=1e-4, atol=5e-6)
    assert_trees_close(state[0].start, of(params, "embed", "final_norm", "layers"), rtol=0, atol=0)


def test_the_mean_of_the_weights_starts_at_the_first_and_follows_every_update():
    params, gradients = tree(0), [tree(seed) for seed in (1, 2, 3)]
    trained, state = train(make(params, name="sgd", learning_rate=0.5, ema=0.15, **STEADY), params, gradients)
    average, weights = flatten(params), flatten(params)
    for gradient, decay in zip(map(flatten, gradients), (1 / 10, 0.15, 0.15), strict=True):  # 2 / 11 exceeds 0.15
        weights = {path: np.float64(leaf) - 0.5 * np.float64(gradient[path]) for path, leaf in weights.items()}
        average = {path: decay * np.float64(leaf) + (1 - decay) * weights[path] for path, leaf in average.items()}
    assert_trees_close(trained, unflatten(weights), atol=1e-6)
    assert_trees_close(averaged(state), unflatten(average), atol=1e-6)
    assert_trees_close(jax.jit(averaged)(state), unflatten(average), atol=1e-6)


def test_the_mean_is_kept_in_float32_also_for_weights_that_are_not():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), of(tree(0), "head"))
    trained, state = train(make(params, name="sgd", ema=0.999, **STEADY), params, [params] * 2)
    assert {leaf.dtype for leaf in jax.tree.leaves(averaged(state))} == {jnp.dtype("float32")}
    apart = jax.tree.map(lambda mean, leaf: float(jnp.abs(mean - leaf).max()), averaged(state), trained)
    assert all(0 < distance < 0.03 for distance in jax.tree.leaves(apart))


@pytest.mark.parametrize("groups", [None, {"embed/embedding": 0, "head/bias": 3, "head/kernel": 3}])
def test_a_mean_with_a_slow_decay_forgets_its_start_within_a_short_stage(groups):
    """Weights that are 0 at the start and 1 from the first update on; leaves of a later phase join after 30 updates."""
    start = jax.tree.map(jnp.zeros_like, of(tree(0), "embed", "head"))
    first = of(start, "embed") if groups else start
    keep, one = running_mean(0.999, groups), jax.tree.map(jnp.ones_like, start)
    late = lambda state, tree: carry_state(state, keep.init(tree)) if groups else state  # noqa: E731
    state = keep.init(first)
    for _ in range(30):
        _, state = keep.update(jax.tree.map(jnp.ones_like, first), state, jax.tree.map(jnp.zeros_like, first))
    state = late(state, one | of(start, "head"))
    for _ in range(10):
        _, state = keep.update(jax.tree.map(jnp.zeros_like, one), state, one)
    assert all(float(leaf.min()) > 1 - 1e-4 for leaf in jax.tree.leaves(state.average))


def test_what_is_not_asked_for_holds_no_state():
    params = jax.eval_shape(lambda: tree(0))
    size = lambda **changes: state_bytes(jax.eval_shape(make(params, **changes).transform.init, params))  # noqa: E731
    weights, head = state_bytes(params), state_bytes(params["head"])
    fresh = frozenset({"head/kernel", "head/bias"})
    assert size() == 2 * weights + 8
    assert size(layer_decay=0.5, learning_rates=[["biases", 2]], fresh=fresh) == size()
    assert size(l2_sp=0.1, fresh=fresh) == size() + weights - head
    assert size(ema=0.9) == size() + weights + 4  # and a count
    assert size(groups={path: int("head" in path) for path in flatten(params)}) == size() + 4  # a second count
    assert averaged(make(tree(0)).transform.init(tree(0))) is None


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_leaves_that_join_start_as_fresh_ones_and_disturb_no_others(name):
    params, *gradients = (cut(small(seed), (0, 2), (2, 3)) for seed in range(5))
    start, joins = ("head", "layers/2:3"), ("final_norm", "layers/0:2")
    groups = {path: 0 if path.startswith(start) else 2 for path in flatten(params)}
    settings = {"name": name, "layer_decay": 0.8, "l2_sp": 0.2, "ema": 0.9, "groups": groups}
    first, some = of(params, *start), [of(each, *start) for each in gradients]
    optimizer = make(first, **settings)
    step, old = jax.jit(step_of(optimizer)), optimizer.transform.init(first)
    early, old = step(*step(first, old, some[0]), some[1])
    alone, alone_state = step(*step(early, old, some[2]), some[3])  # nothing ever joins

    optimizer = make(params, **settings)
    now = unflatten(flatten(of(params, *joins)) | flatten(early))
    step, state = jax.jit(step_of(optimizer)), carry_state(old, optimizer.transform.init(now))
    joined, state = step(now, state, gradients[2])
    final, state = step(joined, state, gradients[3])
    assert_trees_close(of(final, *start), alone, rtol=1e-6, atol=1e-8)
    assert_trees_close(of(averaged(state), *start), averaged(alone_state), rtol=1e-6, atol=1e-8)
    assert_trees_close(of(state[0].start, *start), first, rtol=0, atol=0)

    new = of(params, *joins)
    fresh = make(new, name=name, layer_decay=0.8, learning_rate=1.0, **STEADY)
    rate = expected_rate("cosine", 2, 0.01, 10, 2, 0, 0.1)
    update, _ = jax.jit(fresh.transform.update)(of(gradients[2], *joins), fresh.transform.init(new), new)
    expected = jax.tree.map(lambda leaf, change: leaf + rate * change, new, update)
    assert_trees_close(of(joined, *joins), expected, rtol=1e-6, atol=1e-6)


def test_the_first_adam_step_of_a_leaf_that_joins_is_one_learning_rate_long_and_not_three():
    params = of(tree(0), "head", "final_norm")
    head, groups = of(params, "head"), {"head/bias": 0, "head/kernel": 0, "final_norm/scale": 3000}
    settings = {"groups": groups, "steps": 4000, **STEADY}
    old = make(head, **settings).transform.init(head)
    old = jax.tree.map(lambda leaf: leaf + 3000 if leaf.dtype == jnp.int32 else leaf, old)  # as many updates later
    optimizer = make(params, **settings)
    state = carry_state(old, optimizer.transform.init(params))
    updates, _ = optimizer.transform.update(params, state, params)
    np.testing.assert_allclose(np.abs(updates["final_norm"]["scale"]), 0.01, rtol=1e-4)  # by one count: 0.0308


def test_the_pull_of_a_leaf_that_joins_is_to_where_it_stood_then():
    params = of(tree(0), "head", "final_norm")
    groups = {"head/bias": 0, "head/kernel": 0, "final_norm/scale": 1}
    settings = {"name": "sgd", "groups": groups, "l2_sp": 1.0, **STEADY}
    head, old = train(make(of(params, "head"), **settings), of(params, "head"), [of(tree(1), "head")])
    now = head | of(params, "final_norm")
    optimizer = make(now, **settings)
    state = carry_state(old, optimizer.transform.init(now))
    updates, _ = optimizer.transform.update(jax.tree.map(jnp.zeros_like, now), state, now)
    np.testing.assert_array_equal(updates["final_norm"]["scale"], 0)
    expected = jax.tree.map(lambda start, leaf: -0.01 * (leaf - start), of(params, "head"), head)
    assert_trees_close(of(updates, "head"), expected)


@pytest.mark.parametrize("others", [{"groups": None}, {"ema": 0.5}])
def test_a_state_that_would_not_be_kept_whole_is_not_carried(others):
    params = small(0)
    groups = {path: 0 for path in flatten(params)}
    old = make(params, **{"groups": groups, "ema": 0.0} | others).transform.init(params)
    with pytest.raises(ValueError, match="no leaf of the same path"):
        carry_state(old, make(params, groups=groups).transform.init(params))


def test_a_state_of_other_cuts_is_not_carried():
    one, other = (cut(small(0), *segments) for segments in (((0, 1), (1, 3)), ((0, 2), (2, 3))))
    old, new = (make(each, groups=dict.fromkeys(flatten(each), 0)).transform.init(each) for each in (one, other))
    with pytest.raises(ValueError, match="no leaf of the same path"):
        carry_state(old, new)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_copy_of_the_weights_lies_as_they_do_and_a_donating_step_on_eight_devices_agrees(name, eight_devices):
    params, *gradients = (cut(small(seed), (0, 2), (2, 3)) for seed in range(3))
    settings = {"name": name, "groups": {path: int("head" in path) for path in flatten(params)}, **ALL_AT_ONCE}
    optimizer = make(params, **settings, fresh=frozenset({"head/kernel"}))
    expected, expected_state = train(optimizer, params, gradients)

    def sharding(path: str, leaf: jax.Array) -> NamedSharding:
        axis = "fsdp" if leaf.shape[-1] % 2 == 0 else None
        return NamedSharding(eight_devices, PartitionSpec(*[None] * (leaf.ndim - 1), axis))

    shardings, replicated = map_with_path(sharding, params), NamedSharding(eight_devices, PartitionSpec())
    placed, gradients = (jax.device_put(params, shardings), [jax.device_put(each, shardings) for each in gradients])
    shapes = jax.eval_shape(optimizer.transform.init, params)
    of_state = state_shardings(shapes, params, shardings, replicated)
    assert flatten(averaged(of_state)) == flatten(shardings)
    assert flatten(of_state[0].start) == {p: s for p, s in flatten(shardings).items() if p != "head/kernel"}

    step = jax.jit(step_of(optimizer), donate_argnums=(0, 1), out_shardings=(shardings, of_state))
    state = jax.jit(optimizer.transform.init, out_shardings=of_state)(placed)
    for gradient in gradients:
        placed, state = step(placed, state, gradient)
    assert_trees_close(placed, expected, rtol=1e-4, atol=2e-6)
    assert_trees_close(averaged(state), averaged(expected_state), rtol=1e-4, atol=2e-6)


def test_a_step_may_donate_weights_and_a_state_that_was_made_outside_jit():
    params = tree(0)
    optimizer = make(params, name="sgd", l2_sp=0.1, ema=0.9)
    state = optimizer.transform.init(params)
    step = jax.jit(lambda params, state: optimizer.transform.update(params, state, params), donate_argnums=(0, 1))
    expected, _ = optimizer.transform.update(tree(0), optimizer.transform.init(tree(0)), tree(0))
    updates, _ = step(params, state)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), updates, expected)


def test_a_rule_may_be_about_leaves_that_join_later():
    head = of(tree(0), "head")
    later = {"groups": {"head/bias": 0, "head/kernel": 0, "layers/0:3/mlp/up/kernel": 5}}
    rates = {"learning_rates": [["layers[2]/mlp/.*", 0.5]], **later}
    joined = head | of(tree(0), "layers/0:3/mlp")
    old, new = (make(params, **rates).transform.init(params) for params in (head, joined))
    carry_state(old, new)  # the chain is the same before and after they join
    with pytest.raises(UserError, match="matches nothing trainable"):
        make(head, learning_rates=[["layers[2]/attention/.*", 0.5]], **later)


def test_a_rule_about_frozen_leaves_is_an_error():
    assert L == 3
    top = tree(0, segment="2:3/", layers=slice(2, 3))
    with pytest.raises(UserError, match=r"rule 'layers\[0\]/\.\*' matches nothing trainable"):
        make(top, learning_rates=[["layers[0]/.*", 0.5]])


def test_a_rate_that_an_earlier_one_hides_is_an_error():
    with pytest.raises(UserError, match=r"learning_rates\[1\]: rule 'head/\.\*' decides nothing: 'all' before it"):
        make(of(tree(0), "head", "embed"), learning_rates=[["all", 0.5], ["head/.*", 10.0]])

"""Schedules against closed formulas, optimizers against hand-written ones."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm3.errors import UserError
from llm3.optim.learning_rates import make_schedule
from llm3.optim.optimizer import state_bytes, state_shardings
from llm3.tree import flatten, map_with_path
from tests.helpers.tiny_optim import NAMES, D, H, K, L, adamw_in_float64, expected_rate, make, train, tree

schedule_arguments = st.integers(1, 60).flatmap(
    lambda steps: st.tuples(
        st.sampled_from(["constant", "linear", "cosine", "wsd"]),
        st.just(steps),
        st.integers(0, steps - max(1, steps // 10)),
        st.floats(0, 1),
    )
)


@settings(max_examples=60, deadline=None)
@given(schedule_arguments)
def test_a_schedule_is_its_closed_formula_and_rises_and_then_falls(arguments):
    name, steps, warmup, final = arguments
    rate = make_schedule(name, learning_rate=0.3, steps=steps, warmup_steps=warmup, final_fraction=final)
    reached = np.asarray(rate(jnp.arange(63)))[: steps + 3]  # one shape, compiled once
    expected = [expected_rate(name, step, 0.3, steps, warmup, 0, final) for step in range(steps + 3)]
    np.testing.assert_allclose(reached, expected, rtol=2e-6, atol=2e-7)
    assert (np.diff(reached[: max(warmup, 1)]) > 0).all()
    assert (np.diff(reached[max(warmup - 1, 0) :]) <= 1e-7).all()


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd"])
def test_the_first_update_moves_the_last_of_the_warm_up_has_the_peak_and_the_last_of_all_the_final_rate(name):
    decay = 20 if name == "wsd" else 0
    rate = make_schedule(name, learning_rate=3e-4, steps=100, warmup_steps=7, decay_steps=decay, final_fraction=0.05)
    peak = np.float32(3e-4)
    assert rate(0) == pytest.approx(3e-4 / 7)
    assert rate(6) == peak
    assert rate(99) == pytest.approx(0.05 * 3e-4)
    if name == "wsd":
        assert all(rate(step) == peak for step in range(6, 80))
        assert rate(80) < peak
        assert rate(89) == pytest.approx(3e-4 * (1 - 0.95 / 2))


def test_adamw_with_clipping_decay_and_schedule_agrees_with_numpy_in_float64():
    params, gradients = tree(0), [tree(seed, scale=0.1 * seed) for seed in (1, 2, 3)]
    optimizer = make(params, weight_decay=0.3, clip_norm=2.0, options={"b2": 0.95, "eps": 1e-6})
    trained, _ = train(optimizer, params, gradients)
    by_hand = [expected_rate("cosine", step, 0.01, 10, 2, 0, 0.1) for step in range(3)]
    expected = adamw_in_float64(params, gradients, by_hand, 0.3, 2.0, 0.9, 0.95, 1e-6)
    for path, leaf in flatten(trained).items():
        np.testing.assert_allclose(leaf, expected[path], rtol=2e-6, atol=2e-6, err_msg=path)


@pytest.mark.parametrize("name", NAMES)
def test_weight_decay_moves_kernels_and_embeddings_only_and_by_the_learning_rate(name):
    params = tree(0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    trained, _ = train(make(params, name=name, weight_decay=0.5, warmup_steps=0), params, [zeros])
    for path, leaf in flatten(params).items():
        factor = 1 - 0.01 * 0.5 if path.split("/")[-1] in ("kernel", "embedding") else 1.0
        np.testing.assert_allclose(flatten(trained)[path], factor * leaf, rtol=1e-6, err_msg=path)


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_decreases_a_quadratic(name):
    params, target = tree(0), tree(1)

    def loss(params):
        return sum(jnp.sum((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, (params, target)), strict=True))

    optimizer = make(params, name=name, learning_rate=0.02, steps=40, clip_norm=100.0)
    state, start = optimizer.transform.init(params), float(loss(params))

    @jax.jit
    def step(params, state):
        updates, state = optimizer.transform.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(40):
        params, state = step(params, state)
    assert float(loss(params)) < 0.8 * start


def test_muon_on_a_stack_of_layers_is_muon_on_the_matrix_of_each_layer():
    params, gradient = tree(0), tree(1)
    trained, _ = train(make(params, name="muon", warmup_steps=0), params, [gradient])
    flat = [flatten(each) for each in (params, gradient, trained)]
    for path, shape in {
        "layers/0:3/attention/query/kernel": (D, H * K),
        "layers/0:3/attention/out/kernel": (H * K, D),
        "layers/0:3/mlp/up/kernel": (D, 2 * D),
    }.items():
        for layer in range(L):
            before, slope, after = (np.asarray(each[path][layer]).reshape(shape) for each in flat)
            reference = optax.contrib.muon(0.01)
            update, _ = jax.jit(reference.update)(slope, reference.init(before), before)
            np.testing.assert_allclose(after - before, update, rtol=1e-3, atol=2e-6, err_msg=f"{path} {layer}")


def test_muon_leaves_embeddings_heads_norms_and_biases_to_adam_at_its_own_peak():
    params, gradient = tree(0), tree(1)
    options = {"adam_learning_rate": 0.004}
    trained, _ = train(make(params, name="muon", warmup_steps=0, options=options), params, [gradient])
    adam, _ = train(make(params, learning_rate=0.004, warmup_steps=0, options={"nesterov": True}), params, [gradient])
    for path in ("embed/embedding", "head/kernel", "head/bias", "final_norm/scale", "layers/0:3/attention/query/bias"):
        np.testing.assert_allclose(flatten(trained)[path], flatten(adam)[path], rtol=1e-5, err_msg=path)


def test_adafactor_factors_the_matrix_of_each_layer_and_does_not_mix_layers():
    options = {"min_dim_size_to_factor": 4}
    size = 2 * D
    whole, gradient = tree(0, size=size), tree(1, size=size)
    optimizer = make(whole, name="adafactor", options=options)
    trained, state = train(optimizer, whole, [gradient, gradient])
    one = {"size": size, "segment": "2:3/", "layers": slice(2, 3)}
    alone, _ = train(make(tree(0, **one), name="adafactor", options=options), tree(0, **one), [tree(1, **one)] * 2)
    for path, leaf in flatten(alone).items():
        if path.startswith("layers"):
            together = flatten(trained)[path.replace("2:3", "0:3")]
            np.testing.assert_allclose(leaf[0], together[2], rtol=1e-5, err_msg=path)
    moments = jax.eval_shape(make(whole, name="adamw").transform.init, whole)
    assert state_bytes(state) < 0.3 * state_bytes(moments)


@pytest.mark.parametrize("name", NAMES)
def test_absent_leaves_own_no_state(name):
    head = {"head": tree(0)["head"]}
    _, state = train(make(head, name=name), head, [{"head": tree(1)["head"]}])
    assert state_bytes(state) <= 2 * state_bytes(head) + 100


def test_keeping_the_old_state_keeps_the_place_in_the_schedule():
    params = tree(0)
    optimizer = make(params, name="sgd")
    state = optimizer.transform.init(params)
    first, after = optimizer.transform.update(params, state, params)
    again, _ = optimizer.transform.update(params, state, params)
    second, _ = optimizer.transform.update(params, after, params)
    np.testing.assert_array_equal(first["head"]["bias"], again["head"]["bias"])
    np.testing.assert_allclose(second["head"]["bias"], 2 * first["head"]["bias"], rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_moments_take_the_sharding_of_their_parameter(name):
    params = jax.eval_shape(lambda: tree(0))
    state = jax.eval_shape(make(params, name=name, options={}).transform.init, params)
    shardings = state_shardings(state, params, map_with_path(lambda path, _: path, params), "replicated")
    assert jax.tree.structure(shardings) == jax.tree.structure(state)
    placed = jax.tree.leaves(shardings)
    for path, leaf in flatten(params).items():
        moments = {"adamw": 2, "lion": 1, "sgd": 0, "muon": 1 if "layers" in path and "kernel" in path else 2}
        if name in moments:
            assert placed.count(path) == moments[name], (path, leaf)


def pairs(*each) -> dict:
    return {"learning_rates": list(each)}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"name": "adam"}, "did you mean 'adamw'"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"options": {"bb1": 0.9}}, "did you mean 'b1'"),
        ({"options": {"mask": None}}, "no option of adamw"),
        ({"name": "sgd", "options": {"momentun": 0.9}}, "did you mean 'momentum'"),
        ({"warmup_steps": 11}, "at most the 10 steps"),
        ({"schedule": "wsd", "warmup_steps": 6, "decay_steps": 5}, "a decay of 5"),
        ({"decay_steps": 5}, "belongs to schedule='wsd'"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"final_fraction": -0.1}, "final_fraction"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"clip_norm": -0.1}, "clip_norm"),
        ({"steps": 0, "warmup_steps": 0}, "steps"),
        ({"layer_decay": 0.0}, r"optimizer\.layer_decay=0\.0: .* above 0"),
        ({"layer_decay": 1.01}, r"optimizer\.layer_decay=1\.01: .* at most 1"),
        ({"l2_sp": -0.1}, r"optimizer\.l2_sp=-0\.1"),
        ({"l2_sp": 0.1, "fresh": frozenset(flatten(tree(0)))}, r"optimizer\.l2_sp=0\.1: .* a parent"),
        ({"ema": 1.0}, r"optimizer\.ema=1\.0: .* without 1"),
        ({"ema": -0.1}, r"optimizer\.ema=-0\.1"),
        ({"learning_rates": "biases"}, r"optimizer\.learning_rates='biases': .* pairs"),
        (pairs("biases", 0.5), r"optimizer\.learning_rates\[0\]='biases': expected \[rule, factor\]"),
        (pairs(["norms", 1], ["biases"]), r"optimizer\.learning_rates\[1\]=.*expected \[rule, factor\]"),
        (pairs([0.5, "biases"]), r"expected \[rule, factor\]"),
        (pairs(["biases", 0.0]), "factor above 0"),
        (pairs(["biases", float("nan")]), "factor above 0"),
        (pairs(["biases", "2"]), "factor above 0"),
        (pairs(["biases", True]), "factor above 0"),
        (pairs(["not biases", 0.5]), "'not' has no factor"),
        (pairs(["layers[7]/.*", 0.5]), r"optimizer\.learning_rates\[0\]: .* layers 0 to 2"),
        (pairs(["layers/mlp/up/(", 0.5]), r"optimizer\.learning_rates\[0\]: .* regular expression"),
        (pairs(["biases", 2.0], ["head/kernal", 0.5]), "'head/kernal' matches nothing .* did you mean 'head/kernel'"),
    ],
)
def test_a_wrong_setting_is_an_error_that_names_it(changes, says):
    with pytest.raises(UserError, match=says):
        make(tree(0), **changes)

"""Moments in 16 and 8 bits, against float32 within bounds that follow from the formats."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llm3.checkpoints.stage_checkpoints import Checkpoints
from llm3.config.model_schema import ModelConfig
from llm3.config.schema import OptimizerConfig
from llm3.errors import UserError
from llm3.models.transformer import abstract
from llm3.optim.moments import LEVELS, _from_codes, _to_bfloat16, _to_codes, low_moments
from llm3.optim.optimizer import carry_state, state_bytes, state_shardings
from llm3.tree import flatten, unflatten
from tests.helpers.meshes import mesh_of
from tests.helpers.tiny import jit
from tests.helpers.tiny_checkpoints import abstract as shapes_of
from tests.helpers.tiny_checkpoints import same
from tests.helpers.tiny_optim import cut, make, step_of, tree

KINDS = pytest.mark.parametrize("kind", ["bfloat16", "float8"])
BIG = 32  # wide enough for blocks


def weights(seed: int) -> dict:
    """Leaves of a transformer that are wide enough for blocks, one in and one outside the stack, and a bias."""
    flat = flatten(tree(seed, size=BIG))
    return unflatten({path: flat[path] for path in ("embed/embedding", "head/bias", "layers/0:3/mlp/up/kernel")})


def gradients(count: int) -> list[dict]:
    """Gradients whose sizes differ by orders of magnitude: the cubes of normal numbers."""
    return [jax.tree.map(lambda x: x**3, weights(seed)) for seed in range(1, count + 1)]


@pytest.mark.parametrize("signed", LEVELS)
def test_every_code_is_a_number_that_is_stored_as_this_code_again(signed):
    codes = np.arange(256, dtype=np.uint8)[None]
    codes = codes[codes != 128][None] if signed else codes  # -0
    scales = np.float32([[3.5]])
    values = _from_codes(jnp.asarray(codes), jnp.asarray(scales), signed)
    rows = jnp.stack([values[0], jnp.full(values.shape[1], 3.5)], axis=1)  # blocks of two, with the same scale
    for random in (0, 65535):
        found, _ = _to_codes(rows, jnp.uint32(random), signed)
        np.testing.assert_array_equal(found[:, 0], codes[0])


@pytest.mark.parametrize("signed", LEVELS)
def test_numbers_are_rounded_by_less_than_an_eighth_and_are_right_on_average(signed):
    values = np.float32([1.0, -0.77 if signed else 0.77, 0.3, 1.5e-3, 2.1e-5])
    random = np.arange(2**16, dtype=np.uint32)[:, None]
    codes, scales = jax.vmap(lambda bits: _to_codes(jnp.asarray(values), bits, signed))(jnp.asarray(random))
    found = np.asarray(jax.vmap(lambda codes, scales: _from_codes(codes, scales, signed))(codes, scales), np.float64)
    assert np.all(np.abs(found - values) < np.abs(values) / 8)
    np.testing.assert_allclose(found.mean(axis=0), values, rtol=1e-5)


def test_bfloat16_is_right_on_average():
    values = np.float32([[0.7301, -1.0 / 3, 1e-20]])
    random = jnp.arange(2**16, dtype=jnp.uint32)[:, None]
    found = np.asarray(_to_bfloat16(jnp.broadcast_to(values, (2**16, 3)), random), np.float64)
    assert np.all(np.abs(found - values) < np.abs(values) * 2.0**-7)
    np.testing.assert_allclose(found.mean(axis=0), values[0], rtol=1e-6)


def test_a_second_moment_that_is_not_zero_does_not_become_zero():
    values = jnp.asarray([[1.0, 1e-30, 0.0, *[0.0] * 13]])
    codes, scales = _to_codes(values, jnp.zeros(values.shape, jnp.uint32), signed=False)
    found = _from_codes(codes, scales, signed=False)
    assert found[0, 0] == 1 and 0 < found[0, 1] < 2.0**-31 and np.all(found[0, 2:] == 0)


@KINDS
def test_the_first_update_is_adamws_and_the_second_is_within_the_rounding_of_the_moments(kind):
    params, (first, second) = weights(0), gradients(2)
    b1, b2, eps = 0.9, 0.999, 1e-8
    rule, plain = low_moments(optax.adam(1.0), kind), optax.adam(1.0)

    @jit
    def both(params):
        found, state = rule.update(first, rule.init(params), params)
        expected, exact = plain.update(first, plain.init(params), params)
        return found, expected, exact, rule.update(second, state, params)[0]

    found, expected, exact, ours = both(params)
    for path, update in flatten(found).items():
        np.testing.assert_allclose(update, flatten(expected)[path], rtol=1e-6, err_msg=path)
    relative, least = {"bfloat16": (2.0**-7, 0), "float8": (2.0**-3, 2.0**-15)}[kind]
    for path, update in flatten(ours).items():
        g, m, v = (np.asarray(flatten(each)[path], np.float64) for each in (second, exact[0].mu, exact[0].nu))
        off_m = b1 * (np.abs(m) * relative + least * np.abs(m).max())
        m, low, high = b1 * m + (1 - b1) * g, *(b2 * v * (1 + each) + (1 - b2) * g**2 for each in (-relative, relative))
        root = lambda v: np.sqrt(v / (1 - b2**2)) + eps  # noqa: E731
        corners = [-(m + sign * off_m) / (1 - b1**2) / root(v) for sign in (-1, 1) for v in (low, high)]
        assert np.all(update >= np.min(corners, axis=0) - 1e-4), path
        assert np.all(update <= np.max(corners, axis=0) + 1e-4), path


@KINDS
def test_a_second_moment_follows_gradients_that_become_smaller(kind):
    """Rounded to the nearest, a code would stay as it is: a step of b2 = 0.999 is far less than half a code."""
    params = {"kernel": jnp.zeros((8, 64))}
    rule = low_moments(optax.adam(1.0), kind)

    def step(state, scale):
        return rule.update({"kernel": scale * signs}, state, params)[1], None

    signs = jnp.asarray(np.random.default_rng(0).choice([-1.0, 1.0], (8, 64)))
    # the last number of each block keeps its size, and with it the scale
    scales = jnp.concatenate([jnp.ones((500, 1, 64)), jnp.full((3000, 1, 64), 0.1).at[..., -1].set(1)])
    state = jit(lambda: jax.lax.scan(step, rule.init(params), scales)[0])()
    exact = (1 - 0.999**500) * 0.999**3000 + 0.01 * (1 - 0.999**3000)
    nu = state[0].nu
    found = (
        nu["kernel"].astype(jnp.float32)
        if kind == "bfloat16"
        else _from_codes(nu.codes["kernel"], nu.scales["kernel"], False)
    )
    np.testing.assert_allclose(found[:, :-1].mean(), exact, rtol=0.05)


@pytest.mark.parametrize(("kind", "most"), [("bfloat16", 0.501), ("float8", 0.27)])
def test_bytes_of_the_state_of_a_large_model(kind, most):
    config = ModelConfig(
        layers=32, d_model=4096, heads=32, kv_heads=8, d_ff=14336, vocab_size=128256, tie_embeddings=False
    )
    params = abstract(config).shapes
    size = {
        each: state_bytes(jax.eval_shape(make(params, moments=each, layers=32).transform.init, params))
        for each in ("float32", kind)
    }
    assert size[kind] <= most * size["float32"]


@pytest.mark.parametrize("kind", ["float8", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_state_that_was_saved_goes_on_bit_for_bit(kind, tmp_path):
    params, steps = weights(0), gradients(4)
    optimizer = make(params, moments=kind, weight_decay=0.1, clip_norm=1.0)
    step = jit(step_of(optimizer))
    half = run(step, params, optimizer.transform.init(params), steps[:2])
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(2, *half, {})
    restored = Checkpoints(tmp_path / "checkpoints", read_only=True)
    again = restored.load_params(2, shapes_of(half[0])), restored.load_opt(2, shapes_of(half[1]))
    assert same(run(step, *again, steps[2:]), run(step, *half, steps[2:]))


@pytest.mark.slow
def test_neither_cuts_of_the_stack_nor_a_mesh_change_an_update():
    params, steps = weights(0), gradients(2)
    optimizer, parts = make(params, moments="float8"), [(0, 1), (1, 3)]
    state = optimizer.transform.init(params)
    expected = run(jit(step_of(optimizer)), params, state, steps)
    in_two = make(own := cut(params, *parts), moments="float8")
    found = run(jit(step_of(in_two)), own, in_two.transform.init(own), [cut(each, *parts) for each in steps])
    assert same(found[0], cut(expected[0], *parts))

    mesh = mesh_of(8, fsdp=4, tensor=2)
    axes = {3: P(None, "fsdp", "tensor"), 2: P("tensor", "fsdp")}
    shardings = jax.tree.map(lambda leaf: NamedSharding(mesh, axes.get(leaf.ndim, P())), params)
    of_state = state_shardings(state, params, shardings, NamedSharding(mesh, P()))
    kernel = lambda part: part["layers"]["0:3"]["mlp"]["up"]["kernel"].spec  # noqa: E731
    assert kernel(of_state[1][0].nu.codes) == P(None, "fsdp", "tensor")
    assert kernel(of_state[1][0].nu.scales) == P(None, "fsdp", None)  # a single block along the last axis
    step = jit(step_of(optimizer), out_shardings=(shardings, of_state))
    placed = jax.device_put((params, state), (shardings, of_state))
    assert same(run(step, *placed, [jax.device_put(each, shardings) for each in steps]), expected)


def run(step: Callable, params: dict, state: object, steps: list[dict]) -> tuple[dict, object]:
    for each in steps:
        params, state = step(params, state, each)
    return params, state


def test_leaves_that_join_later_start_fresh_and_keep_the_moments_of_the_others():
    params, (gradient, _) = weights(0), gradients(2)
    paths = list(flatten(params))
    groups = {path: int("mlp" in path) for path in paths}
    first = unflatten({path: leaf for path, leaf in flatten(params).items() if not groups[path]})
    before = make(first, moments="float8", groups=groups)
    part = unflatten({path: flatten(gradient)[path] for path in flatten(first)})
    state = run(step_of(before), first, before.transform.init(first), [part])[1]
    after = make(params, moments="float8", groups=groups).transform.init(params)
    joined = carry_state(state, after)[1]
    assert same(joined["0"], state[1]["0"]) and same(joined["1"], after[1]["1"])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"moments": "float4"}, r"moments='float4': did you mean 'float8'"),
        ({"moments": "float8", "name": "lion"}, r"moments='float8': expected it only with name='adamw', not 'lion'"),
        ({"moments": "bfloat16", "options": {"mu_dtype": "bfloat16"}}, "options.mu_dtype: expected none"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused(changes, says):
    with pytest.raises(UserError, match=says):
        make(tree(0), **changes)
    with pytest.raises(UserError, match=says):
        OptimizerConfig(**changes)

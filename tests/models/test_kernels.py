"""The hand-written backward passes against autodiff of the plain formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm3.models.attention.plain import attend
from llm3.models.kernels import embed, linear, unembed
from tests.helpers.tiny import jit

TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 0.05}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: dtype.__name__)


def arrays(*shapes: tuple[int, ...], dtype=jnp.float32) -> list[jax.Array]:
    """Standard normal, of values that bfloat16 has, so that only the products round."""
    random = np.random.default_rng(0)
    return [jnp.asarray(random.standard_normal(shape), jnp.bfloat16).astype(dtype) for shape in shapes]


def value_and_gradients(function, dy, *inputs):
    @jit
    def run(dy, *inputs):
        y, backward = jax.vjp(function, *inputs)
        return y, *backward(dy.astype(y.dtype))

    return jax.device_get(run(dy, *inputs))


def assert_agree(function, plain, dy, inputs, dtype):
    """In value and gradients, relative to the largest entry; the plain formula runs in float32."""
    results = value_and_gradients(function, dy, *inputs)
    expected = value_and_gradients(plain, dy, *(x.astype(jnp.float32) for x in inputs))
    for result, right in zip(results, expected, strict=True):
        error = np.abs(result.astype(np.float32) - right).max() / np.abs(right).max()
        assert error < TOLERANCE[dtype]
    return results


@DTYPES
def test_linear_agrees_with_autodiff(dtype):
    x, kernel, dy = arrays((3, 5, 8), (8, 12), (3, 5, 12), dtype=dtype)
    assert_agree(linear, lambda x, kernel: jnp.einsum("bti,io->bto", x, kernel), dy, (x, kernel), dtype)


def test_linear_computes_in_the_dtype_of_x_and_gives_a_float32_kernel_a_float32_gradient():
    x, dy = arrays((3, 5, 8), (3, 5, 12), dtype=jnp.bfloat16)
    (kernel,) = arrays((8, 12))
    y, dx, dkernel = value_and_gradients(linear, dy, x, kernel)
    assert (y.dtype, dx.dtype, dkernel.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    # summed in float32, not rounded to 8 bits on the way
    exact = np.einsum("bti,bto->io", np.asarray(x, np.float64), np.asarray(dy, np.float64))
    np.testing.assert_allclose(dkernel, exact, atol=1e-4)


def test_a_token_that_occurs_often_has_the_float32_gradient_of_its_embedding():
    """In bfloat16, a sum of ones stops at 256: there 256 + 1 is 256."""
    table, tokens = jnp.zeros((3, 2)), jnp.ones((4, 1000), jnp.int32)
    y, backward = jax.vjp(lambda table: embed(table, tokens, jnp.bfloat16), table)
    (gradient,) = backward(jnp.ones_like(y))
    assert (y.dtype, gradient.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(gradient, [[0, 0], [4000, 4000], [0, 0]])


@DTYPES
def test_unembed_agrees_with_autodiff_and_returns_float32(dtype):
    x, table, dy = arrays((3, 5, 8), (12, 8), (3, 5, 12), dtype=dtype)
    plain = lambda x, table: jnp.einsum("btd,vd->btv", x, table)  # noqa: E731
    y, _, dtable = assert_agree(unembed, plain, dy, (x, table.astype(jnp.float32)), dtype)
    assert (y.dtype, dtable.dtype) == (jnp.float32, jnp.float32)
    exact = np.einsum("btd,vd->btv", np.asarray(x, np.float64), np.asarray(table, np.float64))
    np.testing.assert_allclose(y, exact, atol=1e-5)  # not rounded to 8 bits


def test_linear_can_return_float32():
    x, kernel = arrays((3, 5, 8), (8, 12), dtype=jnp.bfloat16)
    y = linear(x, kernel, jnp.float32)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, np.asarray(x, np.float64) @ np.asarray(kernel, np.float64), atol=1e-5)


def plain_attention(mask, scale=None, softcap=None):
    """With every query head given its own copy of the keys and values that it reads."""

    def apply(query, key, value):
        groups = query.shape[2] // key.shape[2]
        key, value = jnp.repeat(key, groups, axis=2), jnp.repeat(value, groups, axis=2)
        scores = jnp.einsum("bthd,bshd->bhts", query, key) * (scale or 1 / np.sqrt(query.shape[-1]))
        scores = softcap * jnp.tanh(scores / softcap) if softcap else scores
        weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
        return jnp.einsum("bhts,bshd->bthd", weights, value)

    return apply


def masks(length: int) -> dict[str, np.ndarray]:
    causal = np.tril(np.ones((length, length), bool))
    segments = np.array([[1, 1, 1, 2, 2, 0, 0], [1, 2, 2, 2, 2, 2, 3]])
    return {
        "full": np.ones((2, 1, length, length), bool),
        "causal": np.broadcast_to(causal, (2, 1, length, length)),
        "packed": (segments[:, :, None] == segments[:, None, :])[:, None] & causal,
    }


@DTYPES
@pytest.mark.parametrize(("kv_heads", "kind"), [(4, "full"), (2, "causal"), (1, "packed"), (2, "packed")])
def test_attend_agrees_with_autodiff(dtype, kv_heads, kind):
    mask = masks(7)[kind]
    inputs = arrays((2, 7, 4, 6), (2, 7, kv_heads, 6), (2, 7, kv_heads, 6), (2, 7, 4, 6), dtype=dtype)
    assert_agree(lambda q, k, v: attend(q, k, v, mask), plain_attention(mask), inputs[-1], inputs[:3], dtype)


@DTYPES
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attend_scales_and_caps_scores_before_the_mask_also_in_its_gradients(dtype, kv_heads):
    mask = masks(7)["packed"]
    inputs = arrays((2, 7, 4, 6), (2, 7, kv_heads, 6), (2, 7, kv_heads, 6), (2, 7, 4, 6), dtype=dtype)
    capped = lambda q, k, v: attend(q, k, v, mask, False, 0.9, 1.5)  # noqa: E731
    assert_agree(capped, plain_attention(mask, 0.9, 1.5), inputs[-1], inputs[:3], dtype)
    y = capped(*inputs[:3]).astype(jnp.float32)
    for other in (plain_attention(mask, 0.9), plain_attention(mask, None, 1.5)):
        assert np.abs(y - other(*inputs[:3])).max() > 0.1


def test_attend_reads_more_keys_than_it_has_queries():
    mask = masks(7)["causal"][:, :, -2:]
    query, key, value, dy = arrays((2, 2, 4, 6), (2, 7, 2, 6), (2, 7, 2, 6), (2, 2, 4, 6))
    function = lambda q, k, v: attend(q, k, v, mask)  # noqa: E731
    assert_agree(function, plain_attention(mask), dy, (query, key, value), jnp.float32)


@DTYPES
@pytest.mark.parametrize(("kv_heads", "length"), [(4, 8), (2, 8), (2, 7)])
def test_causal_queries_in_blocks_read_what_queries_in_one_read(dtype, kv_heads, length):
    mask = np.broadcast_to(np.tril(np.ones((length, length), bool)), (2, 1, length, length))
    inputs = arrays((2, length, 4, 6), *[(2, length, kv_heads, 6)] * 2, dtype=dtype)
    blocks = jit(lambda *inputs: attend(*inputs, mask, True))(*inputs)
    whole = jit(lambda *inputs: attend(*inputs, mask))(*inputs)
    assert blocks.dtype == dtype
    np.testing.assert_allclose(np.float32(blocks), np.float32(whole), atol=1e-6 if dtype == jnp.float32 else 0.02)


def test_causal_gradients_are_those_of_queries_in_one():
    mask = np.broadcast_to(np.tril(np.ones((8, 8), bool)), (2, 1, 8, 8))
    inputs = arrays((2, 8, 4, 6), (2, 8, 2, 6), (2, 8, 2, 6), (2, 8, 4, 6))
    function = lambda q, k, v: attend(q, k, v, mask, True)  # noqa: E731
    assert_agree(function, plain_attention(mask), inputs[-1], inputs[:3], jnp.float32)


def test_what_the_mask_hides_gets_no_gradient_and_changes_nothing():
    mask = np.ones((1, 1, 3, 5), bool)
    mask[..., 3:] = False
    query, key, value, dy = arrays((1, 3, 2, 4), (1, 5, 2, 4), (1, 5, 2, 4), (1, 3, 2, 4))
    y, _, dkey, dvalue = value_and_gradients(lambda q, k, v: attend(q, k, v, mask), dy, query, key, value)
    assert np.all(dkey[:, 3:] == 0) and np.all(dvalue[:, 3:] == 0)
    assert np.all(dkey[:, :3] != 0) and np.all(dvalue[:, :3] != 0)
    hidden = attend(query, key.at[:, 3:].set(9.0), value.at[:, 3:].set(9.0), mask)
    np.testing.assert_array_equal(hidden, attend(query, key, value, mask))
    np.testing.assert_allclose(hidden, y, atol=1e-6)

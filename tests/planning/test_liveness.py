"""The model of a program's memory and traffic, on programs that can be counted by hand."""

import jax
import jax.numpy as jnp
import pytest

from llm3.planning import liveness
from llm3.planning.liveness import Shares

ROWS, T, D = 7, 64, 32
ALONE = Shares(rows=ROWS, own=ROWS, lengths=1, pieces=1)
X, W = jax.ShapeDtypeStruct((ROWS, T, D), jnp.float32), jax.ShapeDtypeStruct((D, D), jnp.float32)
BYTES = ROWS * T * D * 4  # size of an array like X


def of(function, *shapes, shares=ALONE):
    return liveness.measure(jax.make_jaxpr(function)(*shapes).jaxpr, shares)


def test_a_matmul_counts_two_flops_per_multiplication_and_moves_its_inputs_and_output():
    found = of(lambda x, w: x @ w, X, W)
    assert found.flops == 2 * ROWS * T * D * D
    assert found.moved == 2 * BYTES + 4 * D * D
    assert found.peak == 0, "the result reuses the memory of the input"


def test_fused_element_wise_work_is_not_written():
    assert of(lambda x: jnp.sum(jnp.exp(2 * x) + jnp.tanh(x)), X).peak == 0
    one = of(lambda x, w: jnp.sum(jnp.exp(x @ w) * 2), X, W)
    assert one.peak == BYTES, "a reduction needs the product written, and nothing else"


def test_a_matmul_result_is_written_where_it_is_smallest():
    def through(dtype):
        return lambda x, w: jnp.sum((jnp.exp(x @ w).astype(dtype) @ w.astype(dtype)).astype(jnp.float32) ** 2)

    # two bfloat16 results and the cast kernel
    assert of(through(jnp.bfloat16), X, W).peak == 2 * BYTES / 2 + 2 * D * D
    assert of(through(jnp.float32), X, W).peak == 2 * BYTES


def test_attention_holds_its_scores_in_float32_and_its_weights():
    q = jax.ShapeDtypeStruct((ROWS, T, D), jnp.bfloat16)

    def attention(q, k, v):
        scores = jnp.einsum("btd,bsd->bts", q, k, preferred_element_type=jnp.float32)
        return jnp.einsum("bts,bsd->btd", jax.nn.softmax(scores).astype(q.dtype), v)

    small = 2 * ROWS * T * 4  # the maxima and sums of the rows
    assert 6 * ROWS * T * T <= of(attention, q, q, q).peak <= 6 * ROWS * T * T + small


def test_a_loop_holds_its_stacked_outputs_and_the_peak_of_its_body():
    layers = jax.ShapeDtypeStruct((5, D, D), jnp.float32)

    def run(x, w):
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), x), x, w)[1])

    found = of(run, X, layers)
    assert 5 * BYTES < found.peak <= 8 * BYTES
    assert found.flops == 5 * 2 * ROWS * T * D * D
    assert list(found.largest) == [f"float32[5,{ROWS},{T},{D}]", f"float32[{ROWS},{T},{D}]"]


def test_batched_arrays_count_a_devices_rows_and_other_arrays_its_shard():
    half = Shares(rows=ROWS, own=ROWS / 2, lengths=1, pieces=4)

    def gradient(w, x):
        return jax.grad(lambda w: jnp.sum(jnp.square(x @ w)))(w) * 2

    assert of(gradient, W, X).peak == BYTES + 4 * D * D
    # the kernel is gathered; its gradient is made in full, then sharded
    assert of(gradient, W, X, shares=half).peak == BYTES / 2 + 4 * D * D
    assert of(lambda w: w.T @ w, W, shares=half).moved == 2 * 4 * D * D


def test_unused_operations_are_not_counted():
    def function(x, w):
        _ = jnp.sum(x @ w)
        return x * 2

    assert of(function, X, W).flops == 0


def test_calls_are_inlined():
    nested = jax.jit(lambda x, w: jax.checkpoint(lambda x: x @ w)(x))
    assert of(nested, X, W).flops == 2 * ROWS * T * D * D


@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.dots_with_no_batch_dims_saveable])
def test_remat_counts_recomputed_matmuls(policy):
    def loss(w, x):
        layer = jax.checkpoint(lambda x: jnp.tanh(jnp.tanh(x @ w) @ w), policy=policy)
        return jnp.sum(layer(x))

    product = 2 * ROWS * T * D * D
    # 2 forward, 3 backward (one input, two weights), and 2 if recomputed
    expected = (2 + 3 + 2 * (policy is None)) * product
    assert of(jax.value_and_grad(loss), W, X).flops == expected


def test_what_a_loop_leaves_in_the_host_takes_nothing_of_the_device():
    layers = jax.ShapeDtypeStruct((5, D, D), jnp.float32)

    def run(x, w):
        step = lambda x, w: (jnp.tanh(x @ w), jax.device_put(x, jax.memory.Space.Host))  # noqa: E731
        last, left = jax.lax.scan(step, x, w)
        return jnp.sum(last), jax.device_put(left[2], jax.memory.Space.Device)

    assert of(run, X, layers).peak <= 3 * BYTES

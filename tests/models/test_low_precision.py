"""Products in 8 bits against float32, within bounds that follow from the formats."""

import collections
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llm3.config.model_schema import AdapterConfig
from llm3.distributed.sharding import tree_shardings
from llm3.errors import UserError
from llm3.models.kernels import linear
from llm3.models.low_precision import FORMATS
from llm3.models.transformer import REMAT_POLICIES, abstract
from llm3.objectives import causal
from llm3.optim.frozen import make_storage
from llm3.optim.partition import make_partition
from llm3.tree import flatten
from tests.helpers.meshes import mesh_of
from tests.helpers.tiny import jit, make_batch, make_params, model_config
from tests.helpers.tiny_jaxpr import programs

pytest.importorskip("qwix", reason="needs pip install 'llm3[qwix]'")
KINDS = pytest.mark.parametrize("kind", FORMATS)


def heavy_tailed(*shape: int, seed: int) -> np.ndarray:
    """Numbers of very different sizes, as activations and gradients are: the cubes of normal ones."""
    return (np.random.default_rng(seed).standard_normal(shape) ** 3).astype(np.float32)


def rounding(array: np.ndarray, axis: int, kind: str) -> np.ndarray:
    """The most by which each number of an array is rounded, with one scale along `axis`.

    int8: half a step of 127.5 in the largest magnitude. fp8: half of the last of 3 bits, and half of the smallest
    number, 2^-9, where the largest is 448.
    """
    largest = np.abs(array).max(axis=axis, keepdims=True)
    bound = largest / 255 if kind == "int8" else np.maximum(np.abs(array) / 16, largest / 448 * 2.0**-10)
    return np.broadcast_to(bound * 1.001, array.shape)


def product_bound(a: np.ndarray, b: np.ndarray, kind: str) -> np.ndarray:
    """The most by which a @ b is off, a: [N, K] and b: [K, M], if both operands are rounded."""
    off_a, off_b = rounding(a, 1, kind), rounding(b, 0, kind)
    return off_a @ np.abs(b) + np.abs(a) @ off_b + off_a @ off_b


@KINDS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_value_and_gradient_of_x_are_rounded_by_the_format_and_that_of_the_kernel_is_not(kind, dtype):
    x, kernel, dy = heavy_tailed(2, 12, 40, seed=0), heavy_tailed(40, 24, seed=1), heavy_tailed(2, 12, 24, seed=2)
    x, dy = (np.asarray(jnp.asarray(each, dtype), np.float32) for each in (x, dy))

    @jit
    def run(x, kernel, dy):
        y, back = jax.vjp(lambda x, kernel: linear(x, kernel, None, kind), x, kernel)
        return y, *back(dy)

    y, dx, dkernel = run(jnp.asarray(x, dtype), kernel, jnp.asarray(dy, dtype))
    assert (y.dtype, dx.dtype, dkernel.dtype) == (jnp.dtype(dtype), jnp.dtype(dtype), jnp.float32)
    flat, back = x.reshape(24, 40), dy.reshape(24, 24)
    last_bit = 2.0**-8 if dtype == "bfloat16" else 2.0**-20
    for found, left, right in ((y, flat, kernel), (dx, back, kernel.T)):
        exact = left.astype(np.float64) @ right
        off = np.abs(np.asarray(found, np.float64).reshape(exact.shape) - exact)
        assert np.all(off <= product_bound(left, right, kind) + 2 * last_bit * np.abs(exact) + 1e-6)
        assert np.linalg.norm(off) > 1e-3 * np.linalg.norm(exact)  # it was rounded at all
    np.testing.assert_allclose(dkernel, flat.T @ back, rtol=1e-4, atol=1e-3)


@KINDS
def test_operands_of_the_program_are_in_the_format(kind):
    x, kernel = jnp.ones((2, 3, 8)), jnp.ones((8, 4))
    text = jax.jit(jax.grad(lambda x: linear(x, kernel, None, kind).sum())).lower(x).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    name = {"int8": "xi8>", "fp8": "xf8E4M3FN>"}[kind]
    assert products and all(line.count(name) == 2 for line in products)


@pytest.mark.parametrize("cut", [("fsdp", "tensor"), ("tensor", "fsdp")])
def test_scales_do_not_depend_on_how_a_mesh_cuts_the_operands(cut):
    """Sums of integers are exact, so equal scales give equal bits."""
    mesh = mesh_of(8, data=2, fsdp=2, tensor=2)
    x, kernel = heavy_tailed(4, 6, 16, seed=0), heavy_tailed(16, 8, seed=1)

    @jit
    def run(x, kernel):
        y, back = jax.vjp(lambda x: linear(x, kernel, None, "int8"), x)
        return y, *back(y)

    inputs = (P(("data", "fsdp"), None, "tensor" if cut[0] == "tensor" else None), P(*cut))
    placed = (jax.device_put(each, NamedSharding(mesh, spec)) for each, spec in zip((x, kernel), inputs, strict=True))
    for ours, theirs in zip(run(x, kernel), run(*placed), strict=True):
        np.testing.assert_array_equal(theirs, ours)


@KINDS
def test_zeros_stay_zero_and_what_is_not_finite_is_seen(kind):
    kernel = jnp.ones((8, 4))
    np.testing.assert_array_equal(linear(jnp.zeros((1, 2, 8)), kernel, None, kind), 0)
    for wrong in (jnp.nan, jnp.inf):
        y = linear(jnp.ones((1, 2, 8)).at[0, 1, 3].set(wrong), kernel, None, kind)
        assert np.all(np.isfinite(y[0, 0])) and not np.any(np.isfinite(y[0, 1]))


def test_a_missing_qwix_is_named_before_anything_is_computed(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "qwix" else found(name))
    with pytest.raises(UserError, match=r"config\.model\.matmul='int8': needs qwix.*pip install 'llm3\[qwix\]'"):
        linear(jnp.ones((1, 2, 8)), jnp.ones((8, 4)), None, "int8")


def test_remat_of_dots_keeps_the_scaled_products_and_computes_none_again():
    x, kernels = jnp.ones((2, 5, 8)), jnp.ones((2, 8, 8))
    both = lambda x, kernels: linear(linear(x, kernels[0], None, "int8"), kernels[1], None, "int8") ** 2  # noqa: E731
    layers = jax.checkpoint(both, policy=REMAT_POLICIES["dots"])
    _, back = jax.vjp(layers, x, kernels)
    kept = [leaf for leaf in jax.tree.leaves(back) if leaf.shape == x.shape]
    assert len(kept) == 3 and all(leaf.dtype == jnp.float32 for leaf in kept)
    program = jax.make_jaxpr(jax.grad(lambda *inputs: layers(*inputs).sum(), (0, 1)))(x, kernels)
    assert products(program.jaxpr) == {"int8": 4, "float32": 2}


def products(jaxpr) -> dict[str, int]:
    """{dtype of the operands: number of dot_generals} of a program."""
    eqns = (eqn for each in programs(jaxpr) for eqn in each.eqns if eqn.primitive.name == "dot_general")
    return dict(collections.Counter(eqn.invars[0].aval.dtype.name for eqn in eqns))


def make_step(matmul, mesh, rules="all", frozen="float32", **changes):
    """(the loss and the gradients as a function of (trainable, stored), these two trees)."""
    config = model_config(matmul=matmul, **changes)
    params, batch = make_params(config), make_batch(8)
    found = make_partition(params, rules, config.layers)
    cut = abstract(config, found.segments)
    shardings = found.divide(tree_shardings(mesh, cut.shapes, cut.axes))
    storage = make_storage(found.divide(cut.shapes)[1], shardings[1], frozen, config.compute_dtype)

    def loss(trainable, stored):
        return jnp.sum(causal.token_losses(nnx.merge(cut.graph, trainable, stored), batch) * batch.weights)

    trainable, rest = (jax.device_put(*each) for each in zip(found.split(params), shardings, strict=True))
    return jax.value_and_grad(loss), trainable, storage.store(rest)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # seven projections, forward and backward
        ({}, 14),
        # the two frozen layers, a scan of their own, have the forward ones only
        ({"rules": ["layers[2]/.*"]}, 7 + 14),
        # the kernels are codes of 4 bits, the adapters are computed in the compute dtype
        ({"rules": "lora", "frozen": "nf4", "adapters": (("x", AdapterConfig(rank=2)),)}, 0),
    ],
)
def test_products_of_float_kernels_of_the_layers_and_no_others_are_in_8_bits(changes, expected):
    with jax.set_mesh(mesh := mesh_of(1)):
        step, *trees = make_step("int8", mesh, **changes)
        assert products(jax.make_jaxpr(step)(*trees).jaxpr).get("int8", 0) == expected


@pytest.mark.slow
def test_partial_training_under_remat_works_on_a_mesh():
    """Only about the same: a sum in another order may round one number otherwise, and so all that depend on it."""
    rules = ["layers[2]/.*", "final_norm/.*"]

    def run(mesh, remat):
        with jax.set_mesh(mesh):
            step, *trees = make_step("int8", mesh, rules, remat=remat, vocab_size=64)
            loss, gradients = jax.device_get(jit(step)(*trees))
        return loss, flatten(gradients)

    loss, gradients = run(mesh_of(1), "none")
    on_eight, theirs = run(mesh_of(8, data=2, fsdp=2, tensor=2), "dots")
    np.testing.assert_allclose(on_eight, loss, rtol=5e-3)
    for path, gradient in gradients.items():
        off = np.linalg.norm(theirs[path] - gradient)
        assert off < 0.1 * np.linalg.norm(gradient), path


@pytest.mark.slow
def test_training_in_8_bits_follows_that_in_bfloat16():
    def losses(matmul):
        mesh = mesh_of(1)
        with jax.set_mesh(mesh):
            gradient, trainable, stored = make_step(matmul, mesh, compute_dtype="bfloat16", layers=1)

            def step(weights, _):
                loss, slope = gradient(weights, stored)
                return jax.tree.map(lambda w, g: w - 0.002 * g, weights, slope), loss

            return jax.jit(lambda weights: jax.lax.scan(step, weights, length=40)[1])(trainable)

    reference = losses("compute")
    for kind in FORMATS:
        found = losses(kind)
        assert np.abs(found - reference).max() < 0.02 * (reference[0] - reference[-1])

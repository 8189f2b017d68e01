"""What frozen leaves are stored as, and that it is what the step computes with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from llm3.config.schema import AdapterConfig, StageConfig
from llm3.distributed.sharding import tree_shardings
from llm3.errors import UserError
from llm3.models.kernels import linear
from llm3.models.quantized import CODEBOOKS, NF4, Quantized, block_size, quantize, quantized_linear
from llm3.models.transformer import abstract
from llm3.objectives import causal
from llm3.optim.frozen import dequantized, make_storage, rounded
from llm3.optim.optimizer import state_bytes
from llm3.optim.partition import make_partition
from llm3.training.phase import build
from llm3.tree import flatten
from tests.helpers.meshes import mesh_of
from tests.helpers.tiny import TASK, jit, make_batch, make_params, model_config
from tests.helpers.tiny_jaxpr import programs


def normal(*shape, seed=0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def test_nf4_gives_the_values_of_an_independent_library():
    qwix = pytest.importorskip("qwix", reason="the reference for nf4 codes")
    array = normal(128, 24)
    reference = qwix.dequantize(qwix.quantize(array, "nf4", channelwise_axes=[1], tiled_axes={0: 64}))
    np.testing.assert_array_equal(quantize(array, "nf4", 0).dequantized(), reference)


def test_int8_is_off_by_half_a_code_at_most():
    array = np.asarray(normal(2, 64, 5))
    values = np.asarray(quantize(jnp.asarray(array), "int8", 1).dequantized())
    largest = np.abs(array).max(axis=1, keepdims=True)
    assert np.all(np.abs(values - array) <= largest / 254 * (1 + 1e-5))


@settings(max_examples=20, deadline=None)
@given(
    kind=st.sampled_from(sorted(CODEBOOKS)),
    axis=st.integers(0, 2),
    seed=st.integers(0, 99),
    scale=st.sampled_from([0.0, 1e-20, 1.0, 1e20]),
)
def test_what_codes_stand_for_quantises_to_the_same_codes_again(kind, axis, seed, scale):
    array = scale * normal(*np.roll((6, 3, 2), axis), seed=seed)
    once = quantize(array, kind, axis)
    twice = quantize(once.dequantized(), kind, axis)
    assert once.dequantized().shape == array.shape
    np.testing.assert_array_equal(once.dequantized(), twice.dequantized())


def test_a_block_is_the_largest_divisor_up_to_64():
    assert [block_size(n) for n in (704, 256, 126, 96, 6, 67)] == [64, 64, 63, 48, 6, 1]
    assert [block_size(n, 2) for n in (704, 126, 6)] == [64, 42, 6]


def test_nf4_of_an_odd_number_of_inputs_is_refused():
    with pytest.raises(UserError, match=r"frozen='nf4'.*even"):
        quantize(normal(3, 5), "nf4", 0)


def test_nf4_takes_an_eighth_of_the_bytes_and_its_scales():
    assert state_bytes(quantize(normal(128, 64), "nf4", 0)) == 128 * 64 // 2 + 2 * 64 * 4
    assert NF4[7] == 0 and len(NF4) == 16


@pytest.mark.parametrize("kind", sorted(CODEBOOKS))
def test_values_are_those_of_the_codebook_and_no_table_is_gathered_from(kind):
    book = CODEBOOKS[kind]
    codes, scales = np.tile(np.arange(len(book), dtype=np.uint8), (3, 2)).T, np.float32([[0.7, 1e-20, 3e20]])
    stored = codes[:16] | (codes[16:] << 4) if kind == "nf4" else codes
    kernel = Quantized(jnp.asarray(stored), jnp.asarray(scales), kind, -2)
    np.testing.assert_array_equal(jit(Quantized.dequantized)(kernel), book[codes] * scales)

    x = normal(2, 3, len(codes))
    program = jax.make_jaxpr(jax.value_and_grad(lambda x: quantized_linear(x, kernel, 3).sum()))(x)
    names = {eqn.primitive.name for each in programs(program.jaxpr) for eqn in each.eqns}
    assert "dot_general" in names and not {name for name in names if "gather" in name or "slice" in name}


@pytest.mark.parametrize("kind", sorted(CODEBOOKS))
def test_the_product_is_that_with_the_dequantised_kernel_and_keeps_only_codes(kind):
    x, stored = normal(2, 3, 8), quantize(normal(8, 4, 5, seed=1), kind, 0)
    dense = stored.dequantized().reshape(8, 20)
    expected, back = jax.vjp(lambda x: linear(x, dense), x)
    found, found_back = jax.vjp(lambda x: quantized_linear(x, stored, 20), x)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(found_back(expected)[0], back(expected)[0], rtol=1e-6)
    kept = {leaf.dtype.name for leaf in jax.tree.leaves(found_back) if leaf.size == 8 * 20}
    assert "float32" not in kept and "bfloat16" not in kept


def make_step(kind, dtype="float32", devices=1, rules=("layers[2]/.*", "final_norm/.*")):
    """(loss and gradients as a function of (trainable, stored), the storage, the partition, the mesh)."""
    config = model_config(vocab_size=64, compute_dtype=dtype, attention_bias="all", norm="layernorm")
    mesh = mesh_of(1) if devices == 1 else mesh_of(8, data=2, fsdp=2, tensor=2)
    found = make_partition(make_params(config), list(rules), config.layers)
    cut = abstract(config, found.segments)
    shardings = found.divide(tree_shardings(mesh, cut.shapes, cut.axes))
    storage = make_storage(found.divide(cut.shapes)[1], shardings[1], kind, dtype)
    batch = make_batch(8)

    @jit
    @jax.value_and_grad
    def step(trainable, stored):
        model = nnx.merge(cut.graph, trainable, stored)
        return jnp.sum(causal.token_losses(model, batch) * batch.weights)

    with jax.set_mesh(mesh):
        trainable, rest = (
            jax.device_put(*each) for each in zip(found.split(make_params(config)), shardings, strict=True)
        )
        stored = storage.store(rest)
        return step(trainable, stored), stored, rest, storage


@pytest.mark.slow
def test_the_compute_dtype_changes_no_bit_of_a_step():
    (loss, gradients), stored, rest, _ = make_step("compute", "bfloat16")
    (expected, reference), *_ = make_step("float32", "bfloat16")
    assert loss == expected
    for path, gradient in flatten(gradients).items():
        np.testing.assert_array_equal(gradient, flatten(reference)[path], err_msg=path)
    dtypes = {path.split("/")[-1]: leaf.dtype.name for path, leaf in flatten(stored).items() if "norm" not in path}
    assert dtypes == {"kernel": "bfloat16", "bias": "float32", "embedding": "bfloat16"}
    assert all(leaf.dtype == jnp.float32 for path, leaf in flatten(stored).items() if "norm" in path)
    assert state_bytes(stored) < 0.53 * state_bytes(rest)


def test_what_dora_takes_the_norm_of_stays_as_it_is():
    """Its magnitudes are norms of the float32 kernel: of a rounded one, step 0 would not be the base."""
    adapter = AdapterConfig(rank=2, dora=True, targets=("query", "down"))
    config = model_config(compute_dtype="bfloat16", adapters=(("x", adapter),))
    mesh = mesh_of(1)
    stage = StageConfig("finetune", {"a": 1.0}, 5, 4, 16, start="x", train="lora", frozen="compute")
    with jax.set_mesh(mesh):
        phase = build(stage, config, mesh, task=TASK, fresh=lambda path: True, seed=0, where="stage")[0]
    dtypes = {path.split("/")[-2]: leaf.dtype.name for path, leaf in flatten(phase.abstract_state.frozen).items()}
    assert dtypes["query"] == dtypes["down"] == "float32" and dtypes["key"] == dtypes["up"] == "bfloat16"


def test_storing_nothing_otherwise_is_refused():
    stage = StageConfig("finetune", {"a": 1.0}, 5, 4, 16, start="x", train="all", frozen="nf4")
    with pytest.raises(UserError, match=r"stage\.frozen='nf4': nothing is frozen"):
        build(stage, model_config(), mesh_of(1), task=TASK, fresh=lambda path: True, seed=0, where="stage")


@pytest.mark.parametrize("kind", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_step_over_codes_is_the_step_over_what_they_stand_for(kind):
    (loss, gradients), stored, rest, storage = make_step(kind)
    assert sum(isinstance(leaf, Quantized) for leaf in flatten(stored).values()) == 7
    expected = flatten(rounded(rest, storage))
    for path, leaf in flatten(dequantized(stored)).items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)
    for path, leaf in flatten(dequantized(storage.store(rounded(rest, storage)))).items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)
    (on_eight, their_gradients), *_ = make_step(kind, devices=8)
    np.testing.assert_allclose(on_eight, loss, rtol=1e-5)
    for path, gradient in flatten(gradients).items():
        np.testing.assert_allclose(flatten(their_gradients)[path], gradient, atol=1e-4, err_msg=path)


def test_codes_are_cut_over_devices_as_their_kernels_are():
    _, stored, _, storage = make_step("nf4", devices=8)
    kernel = flatten(stored)["layers/0:2/attention/query/kernel"]
    assert kernel.codes.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor", None)
    for leaf, promised in zip(jax.tree.leaves(stored), jax.tree.leaves(storage.abstract), strict=True):
        assert leaf.shape == promised.shape and leaf.sharding.is_equivalent_to(promised.sharding, leaf.ndim)

"""The loss in blocks of the vocabulary against the softmax of all logits."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm3.distributed.sharding import named
from llm3.models.cross_entropy import Head, blocks, cross_entropy
from llm3.planning.hlo import collective_bytes
from tests.helpers.meshes import mesh_of
from tests.helpers.tiny import jit
from tests.helpers.tiny_jaxpr import largest_with_axis

ROWS, LENGTH, D, VOCAB = 8, 4, 12, 61


def plain(head: Head, x, kernel, bias, targets):
    """Nats and likeliest tokens from all logits."""
    logits = jnp.einsum("btd,vd->btv" if head.axis == 0 else "btd,dv->btv", x, kernel)
    logits = logits if bias is None else logits + bias
    logits = head.softcap * jnp.tanh(logits / head.softcap) if head.softcap else logits
    logits = logits[..., : head.vocab]
    chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return jax.nn.logsumexp(logits, -1) - chosen, jnp.argmax(logits, -1)


def arguments(head: Head, columns: int, bias: bool):
    random = np.random.default_rng(0)
    shape = (columns, D) if head.axis == 0 else (D, columns)
    arrays = [random.standard_normal(shape, np.float32) for shape in ((ROWS, LENGTH, D), shape, columns)]
    return (*arrays[: 2 + bias], *(None,) * (not bias)), random.integers(0, head.vocab, (ROWS, LENGTH), np.int32)


def results(function, head: Head, values: tuple, targets, weights):
    """The weighted sum of nats, the likeliest tokens, and the gradients of x, kernel and bias."""

    @jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(values):
        nats, likeliest = function(head, *values, targets)
        return jnp.sum(nats * weights), likeliest

    return jax.device_get(run(values))


def assert_agree(found, expected):
    (value, likeliest), gradients = found
    (exact, tokens), exact_gradients = expected
    assert value == pytest.approx(exact, rel=1e-6)
    np.testing.assert_array_equal(likeliest, tokens)
    for each, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(exact_gradients), strict=True):
        np.testing.assert_allclose(each, other, atol=1e-6 * np.abs(other).max())


WEIGHTS = np.random.default_rng(1).random((ROWS, LENGTH), np.float32)
CASES = {  # of 61 tokens
    "tied, the last block overlaps": (Head(axis=0, vocab=VOCAB, block=16), VOCAB, False),
    "untied, padded, capped, biased": (Head(axis=1, vocab=VOCAB, block=7, softcap=3.0), 64, True),
    "a block is only padding": (Head(axis=0, vocab=VOCAB, block=32), 128, True),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_all_logits_at_once(case):
    head, columns, bias = CASES[case]
    values, targets = arguments(head, columns, bias)
    found, expected = (results(each, head, values, targets, WEIGHTS) for each in (cross_entropy, plain))
    assert_agree(found, expected)


MESHES = [
    ({"fsdp": 2, "context": 2, "tensor": 2}, Head(axis=1, vocab=VOCAB, block=12, softcap=3.0)),
    pytest.param({"data": 2, "fsdp": 4}, Head(axis=0, vocab=VOCAB, block=16), marks=pytest.mark.slow),
    # the last shard only fills up
    pytest.param({"tensor": 8}, Head(axis=0, vocab=50, block=4), marks=pytest.mark.slow),
]


def placed(head: Head, mesh, values, targets):
    axes = ("vocab", "embed") if head.axis == 0 else ("embed", "vocab")
    places = ("batch", "length", None), axes, ("vocab",)
    on_mesh = [named(mesh, *each) for each in places[: 3 - (values[2] is None)]]
    arrays = tuple(map(jax.device_put, values, on_mesh))
    return (*arrays, *values[len(arrays) :]), jax.device_put(targets, named(mesh, "batch", "length"))


@pytest.mark.parametrize(("sizes", "head"), MESHES, ids=lambda each: str(each) if isinstance(each, dict) else "")
def test_eight_devices_compute_what_one_does(sizes, head):
    values, targets = arguments(head, 64, bias=True)
    mesh = mesh_of(8, **sizes)
    with jax.set_mesh(mesh):
        found = results(cross_entropy, head, *placed(head, mesh, values, targets), WEIGHTS)
    assert_agree(found, results(plain, head, values, targets, WEIGHTS))


def compiled(function, head: Head, columns: int, mesh, rows: int, length: int, width: int) -> jax.stages.Compiled:
    """The gradients of hidden states and kernel, on the mesh."""
    axes = ("vocab", "embed") if head.axis == 0 else ("embed", "vocab")
    shape = (columns, width) if head.axis == 0 else (width, columns)
    x = jax.ShapeDtypeStruct((rows, length, width), jnp.float32, sharding=named(mesh, "batch", "length", None))
    kernel = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=named(mesh, *axes))
    targets = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=named(mesh, "batch", "length"))
    run = jax.value_and_grad(lambda x, kernel, targets: function(head, x, kernel, None, targets)[0].sum(), (0, 1))
    with jax.set_mesh(mesh):
        return jax.jit(run, out_shardings=(None, (x.sharding, kernel.sharding))).lower(x, kernel, targets).compile()


def test_a_kernel_is_gathered_once_and_its_gradient_reduced_once_whatever_the_number_of_blocks():
    columns, width = 2048, 16
    text = compiled(cross_entropy, Head(0, columns, 128), columns, mesh_of(8, fsdp=8), 8, 4, width).as_text()
    found, size = collective_bytes(text), columns * width * 4
    assert found["all-gather"] == size
    reduced = found.get("reduce-scatter", 0) * 8 + found.get("all-reduce", 0)
    assert reduced == pytest.approx(size, rel=0.02)  # and the sum of the losses


@pytest.mark.slow
def test_a_cut_vocabulary_is_never_gathered():
    head, columns, width = Head(1, 2000, 64), 2048, 16
    text = compiled(cross_entropy, head, columns, mesh_of(8, tensor=8), 8, 4, width).as_text()
    found = collective_bytes(text)
    assert found.keys() == {"all-reduce"}
    assert found["all-reduce"] <= 8 * 4 * (width + 5) * 4  # of the hidden states' gradient and of values per position


def temporaries(head: Head, sizes: dict[str, int], rows: int, length: int, width: int) -> list[float]:
    """MiB of temporary memory on a device: in blocks, and of all logits at once. rows: of a device."""
    count = math.prod(sizes.values())
    shape = head.vocab, mesh_of(count, **sizes), rows * count, length, width
    programs = (compiled(function, head, *shape) for function in (cross_entropy, plain))
    return [each.memory_analysis().temp_size_in_bytes / 2**20 for each in programs]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"data": 1}, {"data": 8}], ids=["1", "8"])
def test_blocks_need_a_twentieth_of_the_temporary_memory(sizes):
    blocked, whole = temporaries(Head(0, 16384, 512), sizes, 8, 128, 64)
    assert blocked <= 0.05 * whole


def test_frozen_kernels_get_no_gradient_and_no_logits_of_all_tokens_exist():
    head = Head(0, VOCAB, 16)
    (x, kernel, _), targets = arguments(head, VOCAB, bias=False)
    run = jax.grad(lambda x: cross_entropy(head, x, kernel, None, targets)[0].sum())
    program = jax.make_jaxpr(run)(x).jaxpr
    assert str(program).count("dot_general") == 3  # the logits twice, and the gradient of the hidden states
    assert largest_with_axis(program, 16) == ROWS * LENGTH * 16


def test_small_vocabularies_are_one_block_and_large_ones_end_with_the_last_column():
    assert [blocks(columns) for columns in (61, 8192)] == [(1, 61), (1, 8192)]
    assert blocks(131_072) == (32, 4096)
    assert blocks(50_257) == (13, 3968), "of equal size, in whole tiles"
    assert blocks(61, 16) == (4, 16) and blocks(61, 61) == blocks(61, 100) == (1, 61)
    for columns, block in ((8193, 0), (50_257, 0), (151_936, 1000), (3000, 129)):
        count, size = blocks(columns, block)
        assert (count - 1) * size < columns <= count * size


if __name__ == "__main__":  # the table in docs/results.md
    jax.config.update("jax_num_cpu_devices", 8)
    for sizes in ({"data": 1}, {"data": 8}, {"fsdp": 8}):
        print(sizes, *(f"{each:.0f} MiB" for each in temporaries(Head(0, 131_072), sizes, 4, 256, 512)))

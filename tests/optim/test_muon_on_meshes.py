"""Muon's Newton-Schulz iteration on a mesh: the updates of one device, and none of its work twice."""

import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llm3.distributed.sharding import with_sharding
from llm3.optim.optimizer import state_shardings
from llm3.tree import flatten, map_with_path
from tests.helpers.meshes import mesh_of
from tests.helpers.tiny_optim import make, tree

MESHES = [{"data": 2, "fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 8}]
CUTS = {
    "query": PartitionSpec(None, "fsdp", "tensor"),
    "out": PartitionSpec(None, "tensor", None, "fsdp"),
    "up": PartitionSpec(None, "fsdp", "tensor"),
}


def compiled(sizes: dict[str, int], params: dict, **options):
    """update(params, state, gradient) -> params and state, on a mesh of these sizes; and the shardings of both."""
    mesh = mesh_of(int(np.prod([*sizes.values(), 1])), **sizes)
    whole = NamedSharding(mesh, PartitionSpec())

    def sharding(path: str, _) -> NamedSharding:
        cut = CUTS.get(path.split("/")[-2]) if path.endswith("kernel") else None
        return whole if cut is None else NamedSharding(mesh, cut)

    cut = map_with_path(sharding, params)
    shapes = with_sharding(params, cut)
    transform = make(shapes, name="muon", warmup_steps=0, options=options).transform
    state = jax.eval_shape(transform.init, shapes)
    states = state_shardings(state, params, cut, whole)

    def update(params: dict, state, gradient: dict):
        updates, state = transform.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    with jax.set_mesh(mesh):
        program = jax.jit(update, out_shardings=(cut, states)).lower(shapes, with_sharding(state, states), shapes)
        return program.compile(), jax.jit(transform.init, out_shardings=states), cut


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        (MESHES[1], {}),
        pytest.param(MESHES[0], {"consistent_rms": 0.2, "nesterov": False}, marks=pytest.mark.slow),
        pytest.param(MESHES[2], {"adaptive": True, "preconditioning": "aol"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_updates_are_those_of_one_device_where_the_devices_do_not_divide_the_layers(sizes, options):
    params, gradients = tree(0), [tree(1), tree(2)]
    trained = []
    for each in ({}, sizes):
        update, init, cut = compiled(each, params, **options)
        now, slopes = jax.device_put(params, cut), jax.device_put(gradients, [cut, cut])
        state = init(now)
        for slope in slopes:
            now, state = update(now, state, slope)
        trained.append(flatten(jax.device_get(now)))
    for path, leaf in trained[0].items():
        np.testing.assert_allclose(trained[1][path], leaf, rtol=1e-5, atol=2e-6, err_msg=path)


@pytest.mark.parametrize("sizes", [MESHES[0], *(pytest.param(each, marks=pytest.mark.slow) for each in MESHES[1:])])
def test_each_device_iterates_on_its_share_of_the_matrices(sizes):
    layers = map_with_path(lambda path, leaf: np.tile(leaf, (8, *(1,) * (leaf.ndim - 1))), tree(0)["layers"])

    def iteration(sizes: dict[str, int]) -> float:
        """FLOPs of four iterations on one device."""
        more, fewer = (compiled(sizes, {"layers": layers}, ns_steps=steps)[0] for steps in (5, 1))
        return more.cost_analysis()["flops"] - fewer.cost_analysis()["flops"]

    assert iteration({}) == pytest.approx(8 * iteration(sizes), rel=0.03)  # XLA fuses element-wise work differently

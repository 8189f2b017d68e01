"""The mesh, the sharding of leaves, and moments that are sharded as their parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from llm3.config.schema import StageConfig
from llm3.distributed.sharding import (
    LOGICAL_AXES,
    MESH_AXES,
    check_batch,
    constrain,
    make_mesh,
    mesh_shape,
    place_batch,
    spec,
    tree_shardings,
)
from llm3.errors import UserError
from llm3.models.transformer import abstract, abstract_params
from llm3.segments import canonical
from llm3.training.phase import build
from llm3.tree import flatten
from tests.helpers.meshes import mesh_of
from tests.helpers.tiny import TASK, VOCAB, make_batch, make_params, model_config


def sizes(data: int, fsdp: int, tensor: int) -> dict[str, int]:
    return {"data": data, "fsdp": fsdp, "context": 1, "tensor": tensor}


@pytest.mark.parametrize(
    ("given", "devices", "filled"),
    [
        ((-1, 1, 1), 8, (8, 1, 1)),
        ((1, -1, 2), 8, (1, 4, 2)),
        ((2, 2, -1), 8, (2, 2, 2)),
        ((2, 2, -1), 4, (2, 2, 1)),
        ((1, 1, 1), 1, (1, 1, 1)),
    ],
)
def test_one_axis_of_the_mesh_takes_the_remaining_devices(given, devices, filled):
    assert mesh_shape(sizes(*given), devices) == sizes(*filled)


@pytest.mark.parametrize(
    ("given", "devices", "complaint"),
    [
        ((-1, -1, 1), 8, "only one axis can be -1, not data and fsdp"),
        ((3, -1, 1), 8, "does not fit 8 devices"),
        ((2, 2, 1), 8, "must multiply to 8"),
        ((4, 2, 2), 8, "must multiply to 8"),
        ((0, 1, 1), 1, "mesh.data=0: expected a positive size"),
        ((1, 1, -2), 1, "mesh.tensor=-2: expected a positive size"),
    ],
)
def test_a_mesh_that_does_not_fit_is_rejected(given, devices, complaint):
    with pytest.raises(UserError, match=complaint):
        mesh_shape(sizes(*given), devices)


def test_a_mesh_is_made_of_the_devices_it_is_given():
    assert set(make_mesh(sizes(1, -1, 2), jax.devices()[:4]).devices.flat) == set(jax.devices()[:4])
    assert make_mesh(sizes(-1, 1, 1)).size == len(jax.devices())


@pytest.mark.parametrize("across_hosts", ["data", "fsdp", "tensor"])
def test_only_the_axis_across_hosts_has_neighbours_on_different_hosts(across_hosts):
    """Two hosts of four devices, listed alternately."""
    hosts = [jax.devices()[::2], jax.devices()[1::2]]
    mesh = make_mesh(sizes(2, 2, 2), across_hosts=across_hosts, islands=hosts)
    host_of = np.vectorize(lambda device: device in hosts[1])(mesh.devices)
    for place, axis in enumerate(MESH_AXES):
        moved = host_of != np.roll(host_of, 1, axis=place)
        assert moved.all() if axis == across_hosts else not moved.any(), axis


def test_an_axis_over_more_devices_than_hosts_has_its_near_pieces_on_one_host():
    hosts = [jax.devices()[:4], jax.devices()[4:]]
    mesh = make_mesh(sizes(1, -1, 1), across_hosts="fsdp", islands=hosts)
    assert [device in hosts[1] for device in mesh.devices.ravel()] == [False] * 4 + [True] * 4
    alone = make_mesh(sizes(1, -1, 1), across_hosts="fsdp", islands=[jax.devices()])
    assert alone == make_mesh(sizes(1, -1, 1)), "one host has no slow network"


@pytest.mark.parametrize(
    ("across_hosts", "islands", "complaint"),
    [
        ("dat", [4, 4], r"across_hosts='dat': no such mesh axis; did you mean 'data'"),
        ("tensor", [4, 4], "mesh.tensor is 1: expected a multiple of 2"),
        ("data", [3, 5], r"the hosts have \[3, 5\] devices"),
    ],
)
def test_an_axis_that_cannot_span_hosts_is_rejected(across_hosts, islands, complaint):
    first = islands[0]
    hosts = [jax.devices()[:first], jax.devices()[first:]]
    with pytest.raises(UserError, match=complaint):
        make_mesh(sizes(8, 1, 1), across_hosts=across_hosts, islands=hosts)


def test_every_axis_of_every_parameter_has_a_place_in_the_table(eight_devices):
    whole = abstract(
        model_config(qk_norm="head", attention_bias="all", tie_embeddings=False, classes=3, norm="layernorm")
    )
    for path, axes in flatten(whole.axes).items():
        assert set(axes) <= {*LOGICAL_AXES, None}, path
        assert len(axes) == len(flatten(whole.shapes)[path].shape), path
        used = [axis for axis in spec(axes) if axis is not None]
        assert len(used) == len(set(used)), f"{path} is cut twice along one axis of the mesh"


def test_a_leaf_that_the_mesh_does_not_divide_is_named(eight_devices):
    whole = abstract(model_config())
    with pytest.raises(UserError, match=rf"^embed/embedding: its axis 'vocab' of size {VOCAB} cannot be cut into 2"):
        tree_shardings(eight_devices, canonical(whole.shapes), canonical(whole.axes))


def test_heads_of_keys_and_values_that_the_mesh_does_not_divide_stay_whole_and_the_phase_says_so():
    mesh, stage = mesh_of(8, data=2, tensor=4), StageConfig("posttrain", {"a": 1.0}, 10, 8, 16, start="x")
    config = model_config(vocab_size=64, heads=4, kv_heads=2)
    with jax.set_mesh(mesh):
        phase = build(stage, config, mesh, task=TASK, fresh=lambda path: False, seed=0, where="stage")[0]
    specs = {path: leaf.sharding.spec for path, leaf in flatten(phase.abstract_params).items()}
    assert specs["layers/attention/key/kernel"] == PartitionSpec(None, "fsdp", None, None)
    assert specs["layers/attention/query/kernel"] == PartitionSpec(None, "fsdp", "tensor", None)
    assert phase.notes == ["every device holds all 2 kv_heads: mesh tensor=4 does not divide them"]
    with pytest.raises(UserError, match=r"'heads' of size 6 cannot be cut into 4.* config\.mesh\.rules\.heads=None"):
        abstract_params(model_config(vocab_size=64, heads=6, kv_heads=2), mesh)


def test_leaves_are_cut_where_the_table_says(eight_devices):
    whole = abstract(model_config(vocab_size=64))
    shardings = flatten(tree_shardings(eight_devices, canonical(whole.shapes), canonical(whole.axes)))
    assert shardings["embed/embedding"].spec == PartitionSpec("tensor", "fsdp")
    assert shardings["layers/attention/query/kernel"].spec == PartitionSpec(None, "fsdp", "tensor", None)
    assert shardings["layers/mlp/down/kernel"].spec == PartitionSpec(None, "tensor", "fsdp")


def test_check_batch_wants_the_mesh_to_divide_every_micro_batch(eight_devices):
    check_batch(eight_devices, 16, 32, 4, "stage")
    check_batch(eight_devices, 4, 32, 1, "stage")
    with pytest.raises(UserError, match=r"stage\.batch_size=24: expected a multiple of 16 = 4"):
        check_batch(eight_devices, 24, 32, 4, "stage")


def test_each_device_gets_its_rows_of_the_batch_and_no_more(eight_devices):
    batch = make_batch(8)
    placed = place_batch(eight_devices, batch)
    for whole, array in zip(batch, placed, strict=True):
        np.testing.assert_array_equal(array, whole)
        assert array.dtype == whole.dtype
        assert {shard.data.shape for shard in array.addressable_shards} == {(2, 16)}


def test_constrain_leaves_an_array_alone_without_a_mesh(eight_devices):
    x = jnp.ones((8, 4))
    assert constrain(x, "batch", None) is x
    with jax.set_mesh(eight_devices):
        pinned = jax.jit(lambda x: constrain(x, "batch", None))(x)
    assert pinned.sharding.is_equivalent_to(jax.NamedSharding(eight_devices, spec(("batch", None))), 2)


def test_moments_are_sharded_as_their_parameters_and_not_replicated(eight_devices):
    config = model_config(vocab_size=64)
    stage = StageConfig("posttrain", {"a": 1.0}, 10, 8, 16, start="x", train=["layers[1]/mlp/.*", "embeddings"])
    with jax.set_mesh(eight_devices):
        phase = build(stage, config, eight_devices, task=TASK, fresh=lambda path: False, seed=0, where="stage")[0]
        shardings = jax.tree.map(lambda x: x.sharding, phase.abstract_params)
        state = phase.state(jax.device_put(make_params(config), shardings))
    params = flatten(state.trainable)
    adam = next(each for each in jax.tree.leaves(state.opt, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(each, "mu"))
    for moments in (flatten(adam.mu), flatten(adam.nu)):
        assert moments.keys() == params.keys()
        for path, moment in moments.items():
            assert moment.sharding.is_equivalent_to(params[path].sharding, moment.ndim), path
            assert moment.addressable_shards[0].data.size == moment.size // 4, path
    for x, promised in zip(jax.tree.leaves(state), jax.tree.leaves(phase.abstract_state), strict=True):
        assert x.sharding.is_equivalent_to(promised.sharding, x.ndim)

"""The digest of a leaf is that of its bytes, whatever mesh, sharding and number of processes it has."""

import json
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llm3.checkpoints.digests import DIFFERS, digests_of
from llm3.checkpoints.stage_checkpoints import Checkpoints
from llm3.distributed.sharding import over_all_devices
from llm3.tree import block_shape, leaf_digests, whole_leaf_digest
from tests.helpers import forks, two_hosts

RANDOM = np.random.default_rng(0)
LEAVES = {
    "stacked": RANDOM.random((4, 96, 192), np.float32),  # blocks: 1 x 4 x 4
    "odd": RANDOM.random((120, 120), np.float32),  # blocks: 2 x 1; 3 devices cut them
    "half": jnp.asarray(RANDOM.random((24, 960), np.float32), jnp.bfloat16),
    "vector": RANDOM.random(24, np.float32),
    "scalar": np.float32(3),
    "empty": np.zeros((0, 8), np.float32),
}


def on_mesh(leaf: np.ndarray, mesh: Mesh, axes: tuple) -> jax.Array:
    """The leaf with its last dimensions sharded along these axes of the mesh, where those divide them."""
    names = [*[()] * leaf.ndim, *axes][-leaf.ndim :] if leaf.ndim else []
    cuts = [int(np.prod([mesh.shape[axis] for axis in each])) for each in names]
    fits = [names[i] if leaf.shape[i] % cuts[i] == 0 else () for i in range(leaf.ndim)]
    return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*fits)))


@pytest.mark.parametrize("axes", [(("x",), ("y",)), ((), ("x", "y")), (("y", "x"), ()), ((), ())])
@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (3, 1), (2, 2), (3, 2), (4, 2)])
def test_a_digest_does_not_depend_on_the_mesh(sizes, axes):
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    mesh = Mesh(np.array(jax.devices()[: np.prod(sizes)]).reshape(sizes), ("x", "y"))
    placed = {path: on_mesh(np.asarray(leaf), mesh, axes) for path, leaf in LEAVES.items()}
    assert digests_of(placed) == digests_of(LEAVES) == leaf_digests(LEAVES)


def test_the_leaves_have_blocks_that_some_meshes_cut():
    assert block_shape((4, 96, 192), 4) == (4, 24, 48)
    assert block_shape((120, 120), 4) == (60, 120)


def test_arrays_are_spread_over_all_devices_and_the_pieces_of_files_stay_whole_if_possible():
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    for shape, stored, expected in [
        ((4, 64, 128), None, (4, 32, 32)),
        ((4, 64, 128), (4, 8, 128), (4, 8, 128)),
        ((4, 64, 128), (4, 32, 128), (4, 32, 32)),
        ((3, 50), None, (3, 25)),
        ((3, 5), None, (3, 5)),
        ((), None, ()),
    ]:
        assert over_all_devices(shape, stored).shard_shape(shape) == expected


@pytest.mark.slow
def test_two_processes_save_and_verify_in_the_memory_of_their_shards_and_have_the_digests_of_one(tmp_path):
    """They hold 2 x 4 parts of each leaf, and what one of them cannot read, both refuse."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "tests.helpers.two_hosts", str(tmp_path), str(port)]
    pipe, environment = subprocess.PIPE, forks.environment(devices=4) | two_hosts.ENVIRONMENT
    started = [
        subprocess.Popen([*command, str(process), "2"], env=environment, stdout=pipe, text=True) for process in (0, 1)
    ]
    ended = [json.loads(each.communicate(timeout=600)[0].splitlines()[-1]) for each in started]
    for each in ended:
        assert each["save"] < 1.1 * each["shards"] and each["verify"] < 1.1 * each["params"], ended
        assert each["digests"] == 4 * [leaf_digests(two_hosts.parameters())]
        assert each["old"] == {"norm": whole_leaf_digest(two_hosts.parameters()["norm"])}
        assert each["differs"] == DIFFERS
        assert "params cannot be read: a file in it is overwritten" in each["refused"]
    meta = Checkpoints(tmp_path / "large", read_only=True).meta(1)
    params = two_hosts.parameters(scale=2)
    assert meta["digests"] == leaf_digests(params)
    assert meta["opt_digests"] == leaf_digests({path: 2 * leaf for path, leaf in params.items()})

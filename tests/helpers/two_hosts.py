"""One of two processes of four devices that save, verify and load a checkpoint, and what memory that takes.

`python -m tests.helpers.two_hosts DIRECTORY PORT PROCESS SCALE` prints a line of JSON: "params" and "shards", the bytes
of the parameters, and of them and the optimizer state, that this process holds, "save", "verify" and "load", the bytes
by which its memory grew meanwhile at most, "refused", what it said of a file that only the first process finds damaged,
"digests", those of the parameters on several meshes, "old", that of one of them in the format of older checkpoints, and
"differs", that of an array of which the processes do not hold the same replica.

With ENVIRONMENT, glibc returns freed memory at once: what it keeps for later would count, and depends on the threads.
"""

import ctypes
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llm3.checkpoints import layout
from llm3.checkpoints.digests import digests_of
from llm3.checkpoints.stage_checkpoints import Checkpoints
from llm3.errors import UserError
from llm3.tree import unflatten

ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": f"{2**17}"}
SHAPES = {
    "embed/embedding": (2048, 2048),
    "layers/down": (4, 2048, 1024),
    "layers/up": (4, 1024, 2048),
    "norm": (2100,),
}


def parameters(scale: int = 1) -> dict[str, np.ndarray]:
    """{path: array}; the last axes are so many times as long."""
    random = np.random.default_rng(0)
    return {path: random.random((*shape[:-1], shape[-1] * scale), np.float32) for path, shape in SHAPES.items()}


def place(leaf: np.ndarray, mesh: Mesh) -> jax.Array:
    """Over fsdp along the last but one axis, over tensor along the last one; with less than two axes, over all."""
    spec = PartitionSpec(*[None] * (leaf.ndim - 2), "fsdp", "tensor") if leaf.ndim > 1 else PartitionSpec("fsdp")
    return jax.make_array_from_callback(leaf.shape, NamedSharding(mesh, spec), lambda at: leaf[at])


def grown(action: Callable[[], object]) -> int:
    """The bytes by which the resident memory of this process exceeded that before `action`, at its peak."""

    def status(key: str) -> int:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines[key].split()[0]) * 1024

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else freed memory is taken again, which is no growth
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    action()
    return status("VmHWM") - before


def cycle(directory: Path, scale: int) -> dict[str, int]:
    """Save, verify and load."""
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tensor"))
    params = {path: place(leaf, mesh) for path, leaf in parameters(scale).items()}
    opt = jax.block_until_ready({path: jax.jit(lambda leaf: 2 * leaf)(leaf) for path, leaf in params.items()})
    own, own_opt = (
        sum(shard.data.nbytes for each in part.values() for shard in each.addressable_shards) for part in (params, opt)
    )
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), params)
    with Checkpoints(directory) as checkpoints:

        def save() -> None:
            checkpoints.save(1, unflatten(params), opt, {})
            checkpoints.wait()

        found = {"params": own, "shards": own + own_opt, "save": grown(save)}
        params.clear(), opt.clear()
        found["verify"] = grown(lambda: [path for leaves in checkpoints.verified_params(1) for path in leaves])
        found["load"] = grown(lambda: checkpoints.load_params(1, unflatten(like)))
    return found


def refused(directory: Path) -> str:
    """What this process says of a checkpoint whose largest leaf only the first process cannot read."""
    checkpoints = Checkpoints(directory, read_only=True)
    with pytest.MonkeyPatch.context() as patch:
        if jax.process_index() == 0:
            patch.setattr("llm3.checkpoints.saved_step.ocp.load_checkpointables", _unreadable)
        with pytest.raises(UserError) as error:
            list(checkpoints.verified_params(1))
    return str(error.value)


def digests() -> list[dict[str, str]]:
    """Of `parameters`, with blocks and pieces of blocks on one process, on both, and in pieces on both."""
    devices, params, found = np.array(jax.devices()), parameters(), []
    partly_shared = devices[[0, 1, 2, 4, 3, 5, 6, 7]]  # both processes hold the middle of what 4 x 2 cuts
    for grid in (devices.reshape(4, 2), devices.reshape(2, 4).T, devices.reshape(1, 8), partly_shared.reshape(4, 2)):
        mesh = Mesh(grid, ("fsdp", "tensor"))
        found.append(digests_of({path: place(leaf, mesh) for path, leaf in params.items()}))
    return found


def old() -> dict[str, str]:
    """The digest of "norm" in the format of older checkpoints."""
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tensor"))
    return digests_of({"norm": place(parameters()["norm"], mesh)}, format=1)


def differs() -> str:
    """The digest of an array of zeros, of which one process holds ones."""
    own = np.full(8, jax.process_index(), np.float32)
    replicated = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec())
    return digests_of({"": jax.make_array_from_callback((8,), replicated, lambda at: own[at])})[""]


def _unreadable(*_: object) -> None:
    raise ValueError("DATA_LOSS")


def main(directory: str, port: str, process: str, scale: str = "1") -> None:
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
    layout.FEW_BYTES = 0
    cycle(Path(directory) / "small", 1)  # imports and compiles
    found = cycle(Path(directory) / "large", int(scale)) | {"refused": refused(Path(directory) / "small")}
    print(json.dumps(found | {"digests": digests(), "old": old(), "differs": differs()}))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Digests of leaves that lie on several devices and processes, without gathering them.

A leaf is hashed in the blocks of `tree.block_shape`, where they lie: each block by all processes that hold it, the
first of which sends its digest of 32 bytes to all. Only a block that lies in pieces on several processes is itself
exchanged: where the mesh cuts an axis into a number of parts that the blocks do not have, such as 3.
"""

import itertools
import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from llm3.distributed import processes
from llm3.tree import block_digest, block_shape, digest_of_blocks, leaf_digests, whole_leaf_digest

DIGEST_FORMAT = 2  # of the digests in the metadata of a checkpoint; 1: `whole_leaf_digest`
MOST_BYTES = 2**24  # exchanged at once
SHARED = -1  # the owner of a block that no process holds completely
DIFFERS = "not the same on all processes"  # instead of the digest of a leaf

At = tuple[int, ...]  # the number of a block along each axis


def digests_of(leaves: dict[str, Any], format: int = DIGEST_FORMAT) -> dict[str, str]:
    """`leaf_digests`, also of arrays that are sharded over several processes, which must then all call this.

    Copies one shard of a leaf at a time to the host, in each of a few threads. A leaf whose replicas on several
    processes have different bytes has the digest DIFFERS. Format 1 gathers each leaf.
    """
    if format == 1:
        return {path: whole_leaf_digest(_on_host(leaf)) for path, leaf in leaves.items()}
    laid = {path: _Laid(leaf) for path, leaf in leaves.items() if isinstance(leaf, jax.Array)}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        on_hosts = pool.map(leaf_digests, ({path: leaf} for path, leaf in leaves.items() if path not in laid))
        list(pool.map(_Laid.hash_own, laid.values()))  # the list raises their errors
    _exchange([each for each in laid.values() if not each.addressable])
    found = {path: each.digest for path, each in laid.items()}
    found |= {path: digest for one in on_hosts for path, digest in one.items()}
    return {path: found[path] for path in leaves}


def _on_host(leaf: Any) -> np.ndarray:
    """A leaf as a numpy array. If it is sharded over several processes, all of them must call this."""
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)


class _Part(NamedTuple):
    """A part of a leaf on a process: its bounds per axis.

    data: the shard, None on other processes. first: whether no process before has the same part.
    """

    process: int
    start: tuple[int, ...]
    stop: tuple[int, ...]
    data: Any
    first: bool


def _parts(leaf: jax.Array) -> list[_Part]:
    """The different parts of a leaf on each process."""
    data = {shard.device: shard.data for shard in leaf.addressable_shards}
    holders: dict[tuple, int] = {}
    found: dict[tuple, _Part] = {}
    devices: list[tuple[Any, Any]] = list(leaf.sharding.devices_indices_map(leaf.shape).items())
    for device, index in sorted(devices, key=lambda each: each[0].process_index):
        process = device.process_index
        bounds = tuple(each.indices(size)[:2] for each, size in zip(index, leaf.shape, strict=True))
        first = holders.setdefault(bounds, process) == process
        start, stop = zip(*bounds, strict=True) if bounds else ((), ())
        found.setdefault((process, bounds), _Part(process, start, stop, data.get(device), first))
    return list(found.values())


class _Laid:
    """A leaf on its devices, with its blocks.

    owner: int [*grid], the first process that holds each block, or SHARED. digests: uint8 [*grid, 32], zero where this
    process does not hold the block. pieces: {block: its pieces on this process, zero elsewhere} of the SHARED blocks.
    """

    differs = False

    def __init__(self, leaf: jax.Array):
        self.shape, self.dtype = tuple(leaf.shape), np.dtype(leaf.dtype)
        self.addressable = leaf.is_fully_addressable
        self.block = block_shape(self.shape, self.dtype.itemsize)
        self.grid = tuple(size // max(part, 1) for size, part in zip(self.shape, self.block, strict=True))
        self.digests = np.zeros((*self.grid, 32), np.uint8)
        self.pieces: dict[At, np.ndarray] = {}
        self._parts = _parts(leaf)
        self.owner, self.held = self._holders()

    @property
    def digest(self) -> str:
        """The digest of the leaf, once the digests of all blocks are here."""
        return DIFFERS if self.differs else digest_of_blocks(self.shape, self.dtype, self.digests.tobytes())

    def hash_own(self) -> None:
        """Hash the blocks that this process holds, and collect the pieces of those that are SHARED."""
        for part in (each for each in self._parts if each.data is not None):
            data = _fetch(part.data)
            for at in itertools.product(*self._touched(part)):
                in_block, in_part = self._overlap(at, part)
                piece = data[in_part]
                if piece.shape == self.block:
                    self.hash_block(at, piece)
                elif self.held[at] or (self.owner[at] == SHARED and part.first):
                    self.pieces.setdefault(at, np.zeros(self.block, self.dtype))[in_block] = piece
        for at in [each for each in self.pieces if self.held[each]]:
            self.hash_block(at, self.pieces.pop(at))

    def hash_block(self, at: At, block: np.ndarray) -> None:
        """Note the digest of a block."""
        self.digests[at] = np.frombuffer(block_digest(block), np.uint8)

    def _holders(self) -> tuple[np.ndarray, np.ndarray]:
        """`owner`, and whether this process holds all of each block: bool [*grid]."""
        holders = sorted({part.process for part in self._parts})
        held = np.zeros((len(holders), *self.grid), np.int64)  # elements of each block on each process
        for part in self._parts:
            at: Any = [np.array(each, int) for each in self._touched(part)]
            axes = zip(at, part.start, part.stop, self.block, strict=True)
            sizes = [np.minimum((n + 1) * size, stop) - np.maximum(n * size, start) for n, start, stop, size in axes]
            where: Any = (holders.index(part.process), *np.ix_(*at))
            held[where] += reduce(np.multiply.outer, sizes, np.int64(1))
        complete = held == math.prod(self.block)
        owner = np.where(complete.any(0), np.array(holders)[complete.argmax(0)], SHARED)
        return owner, complete[np.array(holders) == processes.index()].any(0)

    def _touched(self, part: _Part) -> list[range]:
        """The blocks that a part touches, per axis."""
        axes = zip(part.start, part.stop, self.block, strict=True)
        return [range(start // max(size, 1), -(-stop // max(size, 1))) for start, stop, size in axes]

    def _overlap(self, at: At, part: _Part) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Where a block and a part overlap: the slices of the block, and those of the part."""
        in_block, in_part = [], []
        for number, size, start, stop in zip(at, self.block, part.start, part.stop, strict=True):
            low, high = max(number * size, start), min((number + 1) * size, stop)
            in_block.append(slice(low - number * size, high - number * size))
            in_part.append(slice(low - start, high - start))
        return tuple(in_block), tuple(in_part)


def _fetch(data: jax.Array) -> np.ndarray:
    """A shard on the host: no copy on a CPU, else one that `data` does not keep, unlike `np.asarray(data)`."""
    device = next(iter(data.devices()))
    if device.platform != "cpu" and any(each.kind == "pinned_host" for each in device.addressable_memories()):
        data = jax.device_put(data, jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host"))
    return np.asarray(data)


def _exchange(leaves: list[_Laid]) -> None:
    """Complete the digests of leaves that are sharded over several processes."""
    if not leaves:
        return
    group: list[tuple[_Laid, At]] = []
    for leaf, at in [(each, tuple(at)) for each in leaves for at in np.argwhere(each.owner == SHARED).tolist()]:
        if group and sum(_bytes(each) for each, _ in group) + _bytes(leaf) > MOST_BYTES:
            _hash_shared(group)
            group = []
        group.append((leaf, at))
    _hash_shared(group)
    own = [np.where((leaf.owner == processes.index())[..., None], leaf.digests, 0) for leaf in leaves]
    found = processes.total(np.concatenate([each.reshape(-1) for each in own]))
    different = np.zeros(len(leaves), np.int32)
    for number, leaf in enumerate(leaves):
        digests, found = found[: leaf.digests.size].reshape(leaf.digests.shape), found[leaf.digests.size :]
        different[number] = (digests != leaf.digests)[leaf.held].any()
        leaf.digests = digests
    for leaf, differs in zip(leaves, processes.total(different), strict=True):
        leaf.differs = bool(differs)


def _bytes(leaf: _Laid) -> int:
    return math.prod(leaf.block) * leaf.dtype.itemsize


def _hash_shared(blocks: list[tuple[_Laid, At]]) -> None:
    """Hash blocks in pieces: each is the sum of its pieces, which are zero elsewhere."""
    if not blocks:
        return
    own = [leaf.pieces.pop(at, np.zeros(leaf.block, leaf.dtype)) for leaf, at in blocks]
    summed = processes.total(np.concatenate([piece.reshape(-1).view(np.uint8) for piece in own]))
    for leaf, at in blocks:
        block, summed = summed[: _bytes(leaf)], summed[_bytes(leaf) :]
        leaf.hash_block(at, block)
        leaf.owner[at] = 0

"""Machines by name, without having them: what their chips can do, and what lies between these."""

import math
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llm3.distributed.sharding import MESH_AXES, check_across_hosts, mesh_shape
from llm3.errors import UserError, nearest

# Dense bfloat16 peak, FLOP/s for one device as jax counts devices, by the start of `device_kind`.
PEAK_FLOPS: dict[str, float] = {
    "NVIDIA A100": 312e12,  # NVIDIA A100 datasheet, 2021
    "NVIDIA H100 PCIe": 756e12,  # NVIDIA H100 datasheet, 2023, without sparsity
    "NVIDIA H100": 989e12,  # the same, SXM
    "NVIDIA H200": 989e12,  # NVIDIA H200 datasheet, 2024, without sparsity
    "NVIDIA B200": 2250e12,  # NVIDIA HGX B200 datasheet, 2024, without sparsity
    "NVIDIA L4": 121e12,  # NVIDIA L4 datasheet, 2023, without sparsity
    "TPU v3": 61.5e12,  # Google Cloud documentation: 123 TFLOP/s a chip of two cores
    "TPU v4": 275e12,  # Google Cloud documentation
    "TPU v5 lite": 197e12,  # Google Cloud documentation, v5e
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # Google Cloud documentation, v5p
    "TPU v6 lite": 918e12,  # Google Cloud documentation, v6e
    "TPU v6e": 918e12,
}


def peak_flops(device_kind: str) -> float | None:
    """The dense bfloat16 peak of one device, or None where it is not known."""
    matches = [name for name in PEAK_FLOPS if device_kind.startswith(name)]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None


class Chip(NamedTuple):
    """One device as jax counts devices.

    peak: dense bfloat16 FLOP/s. memory: bytes. bandwidth: of the memory, bytes/s. link: bytes/s in one direction, of a
    GPU to all others in its host, of a TPU along one link of the torus. network: bytes/s of one device to other hosts.
    host: devices of one. torus: dimensions of the TPU's network; 0: none. ring: a dimension of a multiple of this many
    chips closes to a ring.
    """

    name: str
    peak: float
    memory: float
    bandwidth: float
    link: float
    network: float
    host: int
    torus: int = 0
    ring: int = 0


GIB = 2**30
# NVIDIA: the datasheets of the GPU and of its DGX system (A100 80GB SXM 2021, H100 SXM 2023, H200 2024, B200 2024).
# Half of NVLink's figure, which counts both directions; one network adapter a GPU: 200 Gbit/s, later 400 Gbit/s.
# TPU: Google Cloud documentation, the page of each version; a link's rate is that of the chip's interconnect over its
# links (6 in three dimensions, 4 in two): 2400, 4800, 1600 and 3200 Gbit/s. What is sold as GB of HBM are GiB.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("a100", PEAK_FLOPS["NVIDIA A100"], 80 * GIB, 2.039e12, 300e9, 25e9, 8),
        Chip("h100", PEAK_FLOPS["NVIDIA H100"], 80 * GIB, 3.35e12, 450e9, 50e9, 8),
        Chip("h200", PEAK_FLOPS["NVIDIA H200"], 141 * GIB, 4.8e12, 450e9, 50e9, 8),
        Chip("b200", PEAK_FLOPS["NVIDIA B200"], 180 * GIB, 8e12, 900e9, 50e9, 8),
        Chip("v4", PEAK_FLOPS["TPU v4"], 32 * GIB, 1.2e12, 50e9, 0, 4, 3, 4),
        Chip("v5e", PEAK_FLOPS["TPU v5e"], 16 * GIB, 0.819e12, 50e9, 0, 4, 2, 16),
        Chip("v5p", PEAK_FLOPS["TPU v5"], 95 * GIB, 2.765e12, 100e9, 0, 4, 3, 4),
        Chip("v6e", PEAK_FLOPS["TPU v6e"], 32 * GIB, 1.64e12, 100e9, 0, 4, 2, 16),
    )
}
EXAMPLES = ("cpu", "h100x8", "h100x64", "a100x8", "h200x8", "b200x8", "v4:2x2x2", "v5p:8x8x8", "v5e:16x16", "v6e:16x16")


class Topology(NamedTuple):
    """`devices` chips of one kind; shape: of a TPU's torus."""

    name: str
    chip: Chip
    devices: int
    shape: tuple[int, ...] = ()

    @property
    def hosts(self) -> int:
        return -(-self.devices // self.chip.host)

    @property
    def is_tpu(self) -> bool:
        return bool(self.chip.torus)


class Link(NamedTuple):
    """What the `size` devices along one mesh axis reach each other by, `hosts` of them being in different hosts.

    inside: bytes/s that a device receives from within its host, or along the torus; between: that all devices of the
    axis in one host receive from other hosts.
    """

    words: str
    size: int
    hosts: int
    inside: float
    between: float

    def gather_seconds(self, size: float) -> float:
        """Of an all-gather of `size` bytes, all pieces together, or a reduce-scatter; an all-reduce takes both.

        Every device receives all but its own piece, every host all but its own pieces: as fast as the slower of both.
        """
        seconds = size * (self.size - 1) / self.size / self.inside
        return max(seconds, size * (self.hosts - 1) / self.hosts / self.between) if self.hosts > 1 else seconds


def parse(text: str) -> Topology:
    """The topology of this name, as in `EXAMPLES`. "cpu" is measured on this machine. Raises UserError."""
    if text == "cpu":
        return Topology(text, _this_cpu(), 1)
    found = re.fullmatch(r"(\w+?)(?:x(\d+)|:(\d+(?:x\d+)*))", text)
    name = found[1] if found else re.split(r"[x:]", text)[0]
    if name not in CHIPS:
        raise UserError(f"--topology={text!r}: no such chip; {nearest(name, [*CHIPS, 'cpu'])}")
    chip = CHIPS[name]
    example = next(each for each in EXAMPLES if each.startswith(name))
    if not found or bool(found[3]) != bool(chip.torus):
        raise UserError(f"--topology={text!r}: expected {'its torus' if chip.torus else 'its devices'}, as {example!r}")
    shape = tuple(map(int, found[3].split("x"))) if found[3] else ()
    devices = math.prod(shape) if shape else int(found[2])
    if len(shape) != chip.torus:
        raise UserError(f"--topology={text!r}: {name} has a torus of {chip.torus} dimensions, as {example!r}")
    if not devices or (devices > chip.host and devices % chip.host):
        raise UserError(f"--topology={text!r}: expected at least 1, and above {chip.host} a multiple: whole hosts")
    return Topology(text, chip, devices, shape)


def links(topology: Topology, sizes: Mapping[str, int], outer: str = "") -> dict[str, Link]:
    """The link of every mesh axis; sizes, outer: as in `config.mesh` and its `across_hosts`. Raises UserError.

    GPUs lie in the mesh as they are numbered, the last axis closest together; `outer` is laid over the hosts first. A
    TPU's mesh axis takes the dimensions of the torus that multiply to its size, the last axis first; if none do, it
    takes one.
    """
    shape = mesh_shape(sizes, topology.devices)
    check_across_hosts(outer)
    if outer and not topology.is_tpu and shape[outer] % topology.hosts:
        raise UserError(f"config.mesh.across_hosts={outer!r}: mesh.{outer} is {shape[outer]}: {topology.hosts} hosts")
    return _torus_links(topology, shape) if topology.is_tpu else _host_links(topology, shape, outer)


def _host_links(topology: Topology, shape: Mapping[str, int], outer: str) -> dict[str, Link]:
    chip, found, stride = topology.chip, {}, 1
    for axis in reversed(MESH_AXES):
        size = shape[axis]
        hosts = topology.hosts if axis == outer else 1
        if not outer:  # as they are numbered
            hosts = size // max(1, min(size, chip.host // stride))
            stride *= size
        members = size // hosts
        where = f"{members} in a host at {chip.link / 1e9:.0f} GB/s" if members > 1 else ""
        over = f"{hosts} hosts at {members} x {chip.network / 1e9:.0f} GB/s" if hosts > 1 else ""
        words = ", ".join(each for each in (where, over) if each)
        found[axis] = Link(words, size, hosts, chip.link, members * chip.network)
    return found


def _torus_links(topology: Topology, shape: Mapping[str, int]) -> dict[str, Link]:
    chip, free, found = topology.chip, sorted(topology.shape), {}
    for axis in reversed(MESH_AXES):
        size = shape[axis]
        taken = _dimensions(free, size) if size > 1 else []
        for each in taken:
            free.remove(each)
        ways = sum(2 if each % chip.ring == 0 else 1 for each in taken) or 1
        words = f"{'x'.join(map(str, taken)) or 'a line'} of the torus at {ways} x {chip.link / 1e9:.0f} GB/s"
        found[axis] = Link(words, size, 1, ways * chip.link, 0)
    return found


def _dimensions(free: list[int], size: int) -> list[int]:
    """The fewest of the dimensions that multiply to a size; else the largest one alone, else none."""
    for count in range(1, len(free) + 1):
        for first in range(len(free) - count + 1):
            if math.prod(free[first : first + count]) == size:
                return free[first : first + count]
    return free[-1:]


def _this_cpu() -> Chip:
    """All cores as one device: memory as the system tells, rates as a product and a copy reach now."""
    told = re.search(r"MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    if told is None:
        raise UserError("--topology='cpu': /proc/meminfo does not tell the memory of this machine")
    size = 1024
    x = np.ones((size, size), np.float32)
    flops = 2 * size**3 / _fastest(lambda: x @ x)
    large = np.ones(2**24, np.float32)  # 64 MiB, beyond any cache but the largest
    other = np.empty_like(large)
    copied = 2 * large.nbytes / _fastest(lambda: np.copyto(other, large))
    return Chip("cpu", flops, int(told[1]) * 1024, copied, copied, copied, 1)


def _fastest(work) -> float:
    """Seconds, the least of five."""
    seconds = []
    for _ in range(5):
        before = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - before)
    return min(seconds)

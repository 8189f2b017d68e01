"""Hardware by name, whether or not you have it: the rates of each chip and the links between chips."""

import math
import re
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from llm3.distributed.mesh_axes import MESH_AXES, check_across_hosts, mesh_shape
from llm3.errors import UserError, nearest

# Dense bfloat16 peak of one jax device in FLOP/s, by exact `device_kind`: a part of a GPU (MIG) has a name of its own.
# NVIDIA states rates with sparsity, which are twice these. A jax device of a TPU v3 or TPU7x is half a chip.
PEAK_FLOPS: dict[str, float] = {
    # NVIDIA A100 datasheet, 2021: PCIe and SXM alike
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A10": 125e12,  # NVIDIA A10 datasheet, 2021
    "NVIDIA A30": 165e12,  # NVIDIA A30 datasheet, 2021
    "NVIDIA A40": 149.7e12,  # NVIDIA A40 datasheet, 2021
    "NVIDIA L4": 121e12,  # NVIDIA L4 datasheet, 2023
    "NVIDIA L40": 181.05e12,  # NVIDIA L40 datasheet, 2023
    "NVIDIA L40S": 362.05e12,  # NVIDIA L40S datasheet, 2023
    # NVIDIA H100 datasheet, 2024: SXM, PCIe (2023) and NVL
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    # NVIDIA GH200 datasheet, 2023: the GPU is an H100 with 96 GB, or one with 144 GB
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA GH200 144G HBM3e": 989e12,
    # NVIDIA H200 datasheet, 2024: SXM and NVL
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA B200": 2250e12,  # NVIDIA HGX B200 datasheet, 2024
    "NVIDIA GB200": 2500e12,  # NVIDIA GB200 NVL72 datasheet, 2024: half a superchip of two GPUs
    # Google Cloud documentation, the page of each version; jax has two names for some of them
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,  # Ironwood
}


def peak_flops(device_kind: str) -> float | None:
    """The dense bfloat16 peak of one device in FLOP/s; None if unknown."""
    return PEAK_FLOPS.get(device_kind)


def unknown_peak(device_kind: str) -> str | None:
    """A sentence on a device whose peak is unknown; None for a known one, and for a CPU, which has no stated peak."""
    if device_kind in PEAK_FLOPS or device_kind.lower() == "cpu":
        return None
    return f"no MFU: the peak rate of {device_kind!r} is unknown (add it to PEAK_FLOPS in llm3/distributed/machines.py)"


class Chip(NamedTuple):
    """The properties of one jax device."""

    name: str
    peak: float  # dense bfloat16 FLOP/s
    memory: float  # bytes
    bandwidth: float  # memory bandwidth, bytes/s
    link: float  # bytes/s in one direction: from a GPU to all others in its host, or along one link of a TPU torus
    network: float  # bytes/s from one device to other hosts
    host: int  # devices per host
    torus: int = 0  # dimensions of the TPU torus; 0: not a TPU
    ring: int = 0  # a torus dimension closes into a ring if its size is a multiple of this


GIB = 2**30
# NVIDIA: the datasheets of the GPU and of its DGX system (A100 80GB SXM 2021, H100 SXM 2023, H200 2024, B200 2024).
# NVLink: half of the datasheet rate, which counts both directions. Network: one adapter per GPU, 200 or 400 Gbit/s.
# TPU: Google Cloud documentation, the page of each version. The rate of a link is the interconnect rate of the chip
# (2400, 4800, 1600 and 3200 Gbit/s) divided by its links (6 in three dimensions, 4 in two). GB of HBM mean GiB.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("a100", PEAK_FLOPS["NVIDIA A100-SXM4-80GB"], 80 * GIB, 2.039e12, 300e9, 25e9, 8),
        Chip("h100", PEAK_FLOPS["NVIDIA H100 80GB HBM3"], 80 * GIB, 3.35e12, 450e9, 50e9, 8),
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
    """`devices` chips of one kind. shape: the sizes of the TPU torus; empty for GPUs and CPU."""

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

    @property
    def platform(self) -> str:
        """cpu, gpu or tpu."""
        return "tpu" if self.is_tpu else "cpu" if self.name == "cpu" else "gpu"


class Link(NamedTuple):
    """The connection between the devices along one mesh axis."""

    words: str  # the connection in words, for the plan
    size: int  # devices along the axis
    hosts: int  # hosts that these devices span
    inside: float  # bytes/s that a device receives from its own host, or along the torus
    between: float  # bytes/s that all devices of the axis in one host together receive from other hosts

    def gather_seconds(self, size: float) -> float:
        """Seconds for an all-gather (or reduce-scatter) of `size` bytes in total; an all-reduce needs both.

        Every device receives all shards but its own, and every host all shards but its own. The slower transfer counts.
        """
        seconds = size * (self.size - 1) / self.size / self.inside
        return max(seconds, size * (self.hosts - 1) / self.hosts / self.between) if self.hosts > 1 else seconds


def parse(text: str, measure: bool = True) -> Topology:
    """Parse the name of a topology, as in `EXAMPLES`. Raises UserError.

    "cpu" is measured on this machine, unless `measure` is False.
    """
    if text == "cpu" and not measure:
        return Topology(text, CHIPS["h100"], 1)
    if text == "cpu":
        return Topology(text, _this_cpu(), 1)
    found = re.fullmatch(r"(\w+?)(?:x(\d+)|:(\d+(?:x\d+)*))", text)
    name = found[1] if found else re.split(r"[x:]", text)[0]
    if name not in CHIPS:
        raise UserError(f"--topology={text!r}: no such chip; {nearest(name, [*CHIPS, 'cpu'])}")
    chip = CHIPS[name]
    example = next(each for each in EXAMPLES if each.startswith(name))
    if not found or bool(found[3]) != bool(chip.torus):
        missing = "torus shape" if chip.torus else "device count"
        raise UserError(f"--topology={text!r}: expected its {missing}, as in {example!r}")
    shape = tuple(map(int, found[3].split("x"))) if found[3] else ()
    devices = math.prod(shape) if shape else int(found[2])
    if len(shape) != chip.torus:
        raise UserError(f"--topology={text!r}: {name} has a torus of {chip.torus} dimensions, as in {example!r}")
    if not devices or (devices > chip.host and devices % chip.host):
        raise UserError(f"--topology={text!r}: expected 1 to {chip.host} devices, or a multiple of {chip.host}")
    return Topology(text, chip, devices, shape)


def links(topology: Topology, sizes: Mapping[str, int], across_hosts: str = "") -> dict[str, Link]:
    """The link of every mesh axis. sizes, across_hosts: as in `config.mesh`. Raises UserError.

    GPUs fill the mesh in the order of their numbers, so the last axis is closest together; `across_hosts` names the
    axis that spans the hosts instead. On a TPU, starting with the last axis, each mesh axis takes the torus dimensions
    whose product is its size, or one dimension if there are none.
    """
    shape = mesh_shape(sizes, topology.devices)
    check_across_hosts(across_hosts)
    if across_hosts and not topology.is_tpu and shape[across_hosts] % topology.hosts:
        raise UserError(
            f"config.mesh.across_hosts={across_hosts!r}: mesh.{across_hosts} is {shape[across_hosts]}: "
            f"expected a multiple of {topology.hosts}, the number of hosts"
        )
    return _torus_links(topology, shape) if topology.is_tpu else _host_links(topology, shape, across_hosts)


def _host_links(topology: Topology, shape: Mapping[str, int], across_hosts: str) -> dict[str, Link]:
    chip, found, stride = topology.chip, {}, 1
    for axis in reversed(MESH_AXES):
        size = shape[axis]
        hosts = topology.hosts if axis == across_hosts else 1
        if not across_hosts:  # in the order of device numbers
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
    """The fewest neighbouring dimensions whose product is `size`; else the largest dimension; else none."""
    for count in range(1, len(free) + 1):
        for first in range(len(free) - count + 1):
            if math.prod(free[first : first + count]) == size:
                return free[first : first + count]
    return free[-1:]


def _this_cpu() -> Chip:
    """All cores as one device: memory as the system states it, rates measured by a matmul and a copy."""
    import numpy as np  # both are slow to import, and only needed here

    from llm3.distributed.memory import machine_bytes

    memory = machine_bytes()
    if memory is None:
        raise UserError("--topology='cpu': /proc/meminfo does not state the memory of this machine")
    size = 1024
    x = np.ones((size, size), np.float32)
    flops = 2 * size**3 / _fastest(lambda: x @ x)
    large = np.ones(2**24, np.float32)  # 64 MiB, larger than most caches
    other = np.empty_like(large)
    copied = 2 * large.nbytes / _fastest(lambda: np.copyto(other, large))
    return Chip("cpu", flops, memory, copied, copied, copied, 1)


def _fastest(work: Callable[[], object]) -> float:
    """The shortest of five runs, in seconds."""
    seconds = []
    for _ in range(5):
        before = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - before)
    return min(seconds)

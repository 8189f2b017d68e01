"""The memory of the devices, or of this machine if the device is the CPU: its size, its peak use, and its end."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from llm3.errors import OutOfMemory, UserError

HOST = "pinned_host"  # jax's name of the memory of the host that devices can copy from and to by themselves
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def check_host(mesh: Any, what: str) -> None:
    """Raise UserError, starting with `what`, unless the devices of a mesh can use the memory of their host.

    Devices that need not exist, those of a plan, can.
    """
    if not isinstance(mesh, Mesh):
        return
    kinds = [memory.kind for memory in mesh.devices.flat[0].addressable_memories()]
    if HOST not in kinds:
        raise UserError(f"{what}: this backend has no memory {HOST!r}; it has {', '.join(kinds)}")


def is_in_host(array: jax.Array) -> bool:
    """Whether an array, or a tracer, is in the memory of the host."""
    return jax.typeof(array).memory_space == jax.memory.Space.Host


def layer_from_host(stack: jax.Array, index: Any) -> jax.Array:
    """stack[index] in the memory of the device, of a stack in that of the host."""
    return jax.device_put(jax.lax.dynamic_index_in_dim(stack, index, keepdims=False), jax.memory.Space.Device)


def on_device(tree: Any) -> Any:
    """Arrays, not tracers, of which those in the memory of the host are copied to that of the device."""
    move = lambda x: jax.device_put(x, x.sharding.with_memory_kind("device")) if is_in_host(x) else x  # noqa: E731
    return jax.tree.map(move, tree)


def reset_peak() -> None:
    """Reset the peak memory of this process, if the system allows it (Linux: man 5 proc, clear_refs)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_bytes() -> int | None:
    """Peak bytes of the fullest local device, or of this process on the CPU; None if unknown."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(stats):
        return max(each["peak_bytes_in_use"] for each in stats)
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


def device_bytes() -> int | None:
    """Bytes that each local device can hold: on the CPU, its share of this machine's memory; None if unknown."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if all("bytes_limit" in each for each in stats):
        return min(each["bytes_limit"] for each in stats)
    whole = machine_bytes() if jax.default_backend() == "cpu" else None
    return None if whole is None else whole // len(stats)


def machine_bytes(root: Path = Path("/")) -> int | None:
    """Bytes of memory of this machine, or of the container it runs in (cgroup v2); None if unknown."""
    try:
        total = re.search(r"MemTotal:\s+(\d+) kB", (root / "proc/meminfo").read_text())
    except OSError:
        return None
    return min([int(total[1]) * 1024, *_cgroup_limits(root)]) if total else None


def _cgroup_limits(root: Path) -> list[int]:
    """The limits of the process's control group and of those that contain it."""
    top = root / "sys/fs/cgroup"
    try:
        own = re.search(r"^0::/(.*)$", (root / "proc/self/cgroup").read_text(), re.MULTILINE)
    except OSError:
        return []
    group = top / own[1] if own else top
    limits = []
    for each in (group, *group.parents):
        if each.is_relative_to(top) and (file := each / "memory.max").is_file():
            limits += [int(text)] if (text := file.read_text().strip()).isdigit() else []
    return limits


def is_exhausted(error: BaseException) -> bool:
    """Whether an error says that memory ran out: jax's, on any backend, or Python's."""
    text = str(error)
    of_jax = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in text
    return isinstance(error, MemoryError) or (of_jax and bool(re.search("memory|allocat", text)))


def asked_bytes(error: BaseException) -> float | None:
    """The bytes that an exhausted error says were asked for; None if it does not say."""
    patterns = r"allocat\D*([\d.]+)\s?([KMGT]?)i?(?:B\b|bytes)", r"[Uu]sed ([\d.]+)([KMGT]?) of"
    found = next((hit for each in patterns if (hit := re.search(each, str(error)))), None)
    return float(found[1]) * UNITS[found[2]] if found else None


@contextmanager
def explained(what: str, fields: Sequence[str]) -> Iterator[None]:
    """Turn an error of exhausted memory into OutOfMemory on one line. fields: what helps, the most helpful first."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not is_exhausted(error):
            raise
        raise exhausted(what, asked_bytes(error), device_bytes(), fields) from error


def exhausted(what: str, asked: float | None, limit: float | None, fields: Sequence[str]) -> OutOfMemory:
    """The error for `what`, which asked for more bytes than a device has."""
    size = "" if asked is None else f" for {gibibytes(asked)}"
    have = "" if limit is None else f"; a device has {gibibytes(limit)}"
    return OutOfMemory(f"{what}: out of memory{size}{have}. What helps, in this order: {', '.join(fields)}")


def gibibytes(size: float) -> str:
    """Bytes in GiB, to read."""
    return f"{size / 2**30:,.2f} GiB" if size < 100 * 2**30 else f"{size / 2**30:,.0f} GiB"

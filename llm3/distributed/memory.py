"""Peak memory of the devices, or of this process if the device is the CPU."""

from pathlib import Path

import jax


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

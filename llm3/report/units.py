"""Numbers formatted for people. None (not applicable) becomes a dash."""

import math
from typing import Any

NOT_APPLICABLE = "-"


def count(value: float | None) -> str:
    """Three significant digits with k, M, G, T, P or E: 1234567 is 1.23M; below 1000 as it is."""
    if value is None:
        return NOT_APPLICABLE
    for factor, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * factor:
            scaled = value / factor
            digits = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
            return f"{scaled:.{digits}f}{letter}"
    return f"{value:.3g}"


def duration(seconds: float | None) -> str:
    """At most two units: 4.2s, 2m 05s, 3h 07m, 2d 04h."""
    if seconds is None:
        return NOT_APPLICABLE
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    total = round(seconds)
    for larger, smaller, names in ((86400, 3600, "dh"), (3600, 60, "hm"), (60, 1, "ms")):
        if total >= larger:
            return f"{total // larger}{names[0]} {total % larger // smaller:02d}{names[1]}"
    raise AssertionError(seconds)


def seconds(value: float | None) -> str:
    """A time of any size, with three significant digits and its unit: 428 ns, 12.3 µs, 346 ms, 1.23 s, 2m 05s."""
    if value is None:
        return NOT_APPLICABLE
    for factor, unit in ((1e-9, "ns"), (1e-6, "µs"), (1e-3, "ms"), (1, "s")):
        if abs(value) < 999.5 * factor and unit != "s":
            return f"{digits(value / factor)} {unit}"
    return f"{digits(value)} s" if abs(value) < 59.95 else duration(value)


def bytes_text(value: float | None) -> str:
    """Bytes with three significant digits and their decimal unit: 31.1 kB, 1.20 GB; memory is in GiB instead."""
    if value is None:
        return NOT_APPLICABLE
    text = count(value)
    return f"{text[:-1]} {text[-1]}B" if text[-1].isalpha() else f"{text} B"


def memory_text(value: float | None) -> str:
    """Bytes of memory with three significant digits and their binary unit: 256 B, 32.0 KiB, 1.20 GiB."""
    if value is None:
        return NOT_APPLICABLE
    for factor, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(value) >= factor:
            return f"{digits(value / factor)} {unit}"
    return f"{value:.0f} B"


def gibibytes(value: float | None) -> str:
    """Bytes in GiB, with two decimals and no unit."""
    return NOT_APPLICABLE if value is None else f"{value / 2**30:.2f}"


def mebibytes(value: float | None) -> str:
    """Bytes in MiB, with three significant digits and no unit."""
    return NOT_APPLICABLE if value is None else digits(value / 2**20)


def milliseconds(seconds: float | None) -> str:
    """Seconds in milliseconds, with three significant digits and no unit."""
    return NOT_APPLICABLE if seconds is None else digits(1000 * seconds)


def digits(value: float) -> str:
    """Three significant digits, but three decimals at most and no powers of ten: 0.012, 0.346, 12.3, 1234."""
    rounded = float(f"{value:.3g}")  # 0.9999 has as many decimals as 1.00
    return f"{value:.{max(0, min(3, 2 - math.floor(math.log10(abs(rounded)))))}f}" if value else "0"


def percent(share: float | None) -> str:
    """A fraction in percent, with one decimal: 0.781 is 78.1 %."""
    return NOT_APPLICABLE if share is None else f"{100 * share:.1f} %"


def fixed(value: float | None) -> str:
    """Three decimals."""
    return NOT_APPLICABLE if value is None else f"{value:.3f}"


def signed(value: float | None) -> str:
    """Three decimals, always with a sign."""
    return NOT_APPLICABLE if value is None else f"{value:+.3f}"


def words(name: str) -> str:
    """A key as words: question_type is question type."""
    return name.replace("_", " ")


def plain(value: Any) -> Any:
    """A numpy or jax scalar as a Python number; anything else unchanged."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value

"""What a compiled program says of itself: how often each part runs, and the bytes its collectives bring to a device."""

import collections
import re

import numpy as np

BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "pred": 1}
KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


def computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation: the entry, the bodies of loops, and what is called."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if start := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            lines = found[start[1]] = []
        lines.append(line)
    return found


def rounds(text: str) -> dict[str, int]:
    """How often each computation runs: the body of a loop in a loop runs as often as both together."""
    callers = collections.defaultdict(list)
    for name, lines in computations(text).items():
        for line in lines:
            count = re.search(r'known_trip_count":\{"n":"(\d+)"', line) if " while(" in line else None
            for inner in re.findall(r"(?:body|calls|to_apply)=%?([\w.\-]+)", line):
                callers[inner].append((name, int(count[1]) if count else 1))

    def times(name: str) -> int:
        return sum(count * times(outer) for outer, count in callers[name]) if callers[name] else 1

    return {name: times(name) for name in computations(text)}


def collective_bytes(text: str) -> dict[str, int]:
    """{kind of collective: bytes of its results on one device}, each round of a loop counted."""
    totals: dict[str, int] = collections.defaultdict(int)
    times = rounds(text)
    for name, lines in computations(text).items():
        for line in lines:
            if each := re.search(rf"= (\(?.*?\)?) ({KINDS})(?:-start)?\(", line):
                shapes = re.findall(r"(\w+)\[([\d,]*)\]", each[1])
                size = sum(BYTES[kind] * int(np.prod([int(n) for n in dims.split(",") if n])) for kind, dims in shapes)
                totals[each[2]] += size * times[name]
    return dict(totals)

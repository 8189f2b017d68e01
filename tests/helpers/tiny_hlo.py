"""What a compiled program says of itself: the bytes that its collectives bring to one device."""

import collections
import re

import numpy as np

BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "pred": 1}
KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


def collective_bytes(text: str) -> dict[str, int]:
    """{kind of collective: bytes of its results on one device}, each round of a loop counted."""
    found, loops = collections.defaultdict(list), {}
    computation = ""
    for line in text.splitlines():
        if start := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            computation = start[1]
        if " while(" in line:
            body, count = (
                re.search(r"body=%?([\w.\-]+)", line)[1],
                re.search(r'known_trip_count":\{"n":"(\d+)"', line)[1],
            )
            loops[body] = computation, int(count)
        if each := re.search(rf"= (\(?.*?\)?) ({KINDS})(?:-start)?\(", line):
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", each[1])
            size = sum(BYTES[kind] * int(np.prod([int(n) for n in dims.split(",") if n])) for kind, dims in shapes)
            found[computation].append((each[2], size))

    def rounds(name: str) -> int:
        """How often a computation runs: a loop in a loop runs as often as both together."""
        outer, count = loops.get(name, ("", 1))
        return count * rounds(outer) if outer else count

    totals: dict[str, int] = collections.defaultdict(int)
    for name, all_of_it in found.items():
        for kind, size in all_of_it:
            totals[kind] += size * rounds(name)
    return dict(totals)

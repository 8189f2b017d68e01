"""What a compiled program says of itself: how often each part runs, its collectives, and which of them overlap.

It reads the text of a scheduled program, `after_optimizations` of XLA's dumps or `Compiled.as_text()`.
"""

import collections
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "pred": 1, "f16": 2, "s8": 1, "u8": 1}
KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\(([^)]*)\)(.*)")
_CALLED = re.compile(r"(?:calls=|to_apply=|called_computations=\{)%?([\w.\-]+)")  # besides bodies of loops
_MATMULS = {"convolution", "dot"}
_KERNELS = ('custom_call_target="tpu_custom_call"', 'custom_call_target="__cublas')


class Found(NamedTuple):
    """A collective of a compiled program.

    size: bytes on one device of the full result (all-gather) or operand (others). times: per step. starts_early:
    whether it has a start and an end of its own, so that other work can run in between. overlaps: whether a matmul, a
    kernel or a loop does.
    """

    kind: str
    size: int
    times: int
    starts_early: bool
    overlaps: bool

    @property
    def bytes(self) -> int:
        return self.size * self.times


class Instruction(NamedTuple):
    """A line of a computation: its name, the text of its shape, its opcode, operands and attributes."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str


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
    parts, callers = computations(text), collections.defaultdict(list)
    for name, lines in parts.items():
        for line in lines:
            count = _trips(line, parts) if " while(" in line else 1
            for inner in re.findall(r"(?:body|calls|to_apply)=%?([\w.\-]+)", line):
                callers[inner].append((name, count))

    def times(name: str) -> int:
        return sum(count * times(outer) for outer, count in callers[name]) if callers[name] else 1

    return {name: times(name) for name in parts}


def _trips(line: str, parts: dict[str, list[str]]) -> int:
    """The rounds of a loop: as XLA notes them, or the bound that its condition compares a count from 0 with."""
    if noted := re.search(r'known_trip_count":\{"n":"(\d+)"', line):
        return int(noted[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    bounds = re.findall(r"= s32\[\]\S* constant\((\d+)\)", "\n".join(parts[condition[1]])) if condition else []
    return int(bounds[0]) if len(bounds) == 1 else 1


def collectives(text: str) -> list[Found]:
    """The collectives of a scheduled program, those of one element left out."""
    program = {name: [*_instructions(lines)] for name, lines in computations(text).items()}
    called = {inner for each in program.values() for one in each for inner in _CALLED.findall(one.rest)}
    times = rounds(text)
    found: list[Found] = []
    for name in program.keys() - called:
        open_: dict[str, list[tuple[str, int]]] = {}  # {name of a start: its collectives}
        busy: dict[str, bool] = {}  # {name of a start: whether anything ran since it had its operands}
        for one in program[name]:
            base = one.opcode.removesuffix("-start").removesuffix("-update").removesuffix("-done")
            first = one.operands[0] if one.operands else ""
            if one.opcode.endswith("-done") and first in open_:
                found += [Found(kind, size, times[name], True, busy[first]) for kind, size in open_.pop(first)]
                busy.pop(first)
            elif one.opcode.endswith("-update") and first in open_:
                open_[one.name], _ = open_.pop(first), busy.pop(first)
                busy[one.name] = False
            elif one.opcode.endswith("-start"):
                if inside := [*_inside(one, name, program)]:
                    open_[one.name], busy[one.name] = inside, False
            else:
                if base in _MATMULS or _works(one, program):
                    busy = dict.fromkeys(busy, True)
                found += [Found(kind, size, times[name], False, False) for kind, size in _inside(one, name, program)]
    return [each for each in found if each.size > BYTES["f32"]]


def _instructions(lines: list[str]) -> Iterator[Instruction]:
    for line in lines:
        if each := _INSTRUCTION.match(re.sub(r"/\*.*?\*/", "", line)):
            operands = tuple(re.findall(r"%([\w.\-]+)", each[4]))
            yield Instruction(each[1], each[2], each[3], operands, each[5])


def _inside(one: Instruction, name: str, program: dict[str, list[Instruction]]) -> Iterator[tuple[str, int]]:
    """(kind, bytes) of the collectives of an instruction of the computation `name`, and of what it calls."""
    kind = one.opcode.removesuffix("-start")
    if kind in KINDS.split("|"):
        shapes = {each.name: each.shape for each in program[name]}
        operands = sum(_bytes(shapes[each]) for each in one.operands if each in shapes)
        results = _bytes(one.shape) if one.opcode == kind else _bytes(one.shape) - operands
        scatters = kind == "all-reduce" and name.startswith("all-reduce-scatter")  # a fusion of both
        yield "reduce-scatter" if scatters else kind, operands if kind == "reduce-scatter" else results
    for inner in () if kind in KINDS.split("|") else _CALLED.findall(one.rest):
        for each in program.get(inner, ()):
            yield from _inside(each, inner, program)


def _works(one: Instruction, program: dict[str, list[Instruction]]) -> bool:
    """Whether an instruction is a loop, a matmul or a kernel, or calls one."""
    if one.opcode in _MATMULS or one.opcode == "while" or any(each in one.rest for each in _KERNELS):
        return True
    return any(_works(each, program) for inner in _CALLED.findall(one.rest) for each in program.get(inner, ()))


def _bytes(shape: str) -> int:
    parts = re.findall(r"(\w+)\[([\d,]*)\]", shape)
    return sum(BYTES.get(kind, 0) * int(np.prod([int(n) for n in dims.split(",") if n])) for kind, dims in parts)


def collective_bytes(text: str) -> dict[str, int]:
    """{kind of collective: bytes of its results on one device}, each round of a loop counted."""
    totals: dict[str, int] = collections.defaultdict(int)
    times = rounds(text)
    for name, lines in computations(text).items():
        for line in lines:
            if each := re.search(rf"= (\(?.*?\)?) ({KINDS})(?:-start)?\(", line):
                totals[each[2]] += _bytes(each[1]) * times[name]
    return dict(totals)

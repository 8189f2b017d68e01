"""`bench --profile`: a trace of some steps, and what its time goes to, by operation and by class of operations."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from llm3.cli.bench.step import BenchStep, Fed
from llm3.errors import UserError

TRACED, SHOWN = 3, 10  # steps, and operations
# operations that contain others, whose time is counted there, or that do nothing
CONTROL = frozenset({"while", "conditional", "call", "tuple", "get-tuple-element", "parameter", "constant", "bitcast"})
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-", "ragged-all-to-all")
# the first class one of whose operations a fusion contains is that of the fusion
CLASSES = {
    "collective": COLLECTIVES,
    "matmul": ("dot", "convolution", "ragged-dot"),
    "scatter": ("scatter", "select-and-scatter"),
    "gather": ("gather",),
    "sort": ("sort", "topk"),
    "reduction": ("reduce", "reduce-window"),
    "random": ("rng", "rng-bit-generator"),
}
COPIES = frozenset({"copy", "transpose", "reshape", "slice", "dynamic-slice", "dynamic-update-slice", "concatenate"})
COPIES |= {"pad", "broadcast", "reverse", "iota"}
ATTENTION, MATMULS = ("attention", "fmha", "flash", "splash"), ("gemm", "matmul", "cublas", "dot", "conv")
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)")
_SCALAR = re.compile(r"\w+\[\]")


class Instruction(NamedTuple):
    """An instruction of a compiled program. kind: its class. of: what in the traced function it comes from."""

    name: str
    kind: str
    of: str


def instructions(hlo: str) -> dict[str, Instruction]:
    """{name: instruction} of a compiled program, as `compiled.as_text()` writes it; those of `CONTROL` are left out."""
    inside: dict[str, set[str]] = defaultdict(set)  # {computation: opcodes, and "calls:NAME" of those it calls}
    lines: list[tuple[str, str, str]] = []
    computation = ""
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            computation = header[1]
        elif found := _INSTRUCTION.match(line):
            name, kind, opcode, rest = found.groups()
            if not _SCALAR.fullmatch(kind) or opcode in CLASSES["reduction"]:  # else arithmetic of indices
                inside[computation].add(opcode)
            inside[computation] |= {f"calls:{each}" for each in re.findall(r"calls=%?([\w.\-]+)", rest)}
            lines.append((name, opcode, rest))
    return {
        name: Instruction(name, _kind(opcode, rest, inside), _origin(rest))
        for name, opcode, rest in lines
        if opcode not in CONTROL
    }


def _kind(opcode: str, rest: str, inside: dict[str, set[str]]) -> str:
    called = re.search(r"calls=%?([\w.\-]+)", rest)
    opcodes = set(_all_inside(called[1], inside)) if called else {opcode}
    target = (re.search(r'custom_call_target="([^"]*)"', rest) or [""] * 2)[1].lower()
    if any(word in target for word in ATTENTION):
        return "attention"
    if any(word in target for word in MATMULS) or (called and "__triton_gemm" in rest):
        return "matmul"
    if target and any(word in _origin(rest).lower() for word in ATTENTION):  # a kernel, named by who calls it
        return "attention"
    for kind, names in CLASSES.items():
        if any(each.startswith(names) if kind == "collective" else each in names for each in opcodes):
            return kind
    if target:
        return "custom call"
    return "copy" if opcodes - CONTROL <= COPIES else "elementwise"


def _all_inside(computation: str, inside: dict[str, set[str]]) -> Iterator[str]:
    for each in inside.get(computation, ()):
        if each.startswith("calls:"):
            yield from _all_inside(each.removeprefix("calls:"), inside)
        else:
            yield each.removesuffix("-start").removesuffix("-done")


def _origin(rest: str) -> str:
    """The last words of the instruction's name in the traced function: "layers/attention/dot_general"."""
    found = re.search(r'op_name="([^"]*)"', rest)
    words = re.sub(r"\w+\([^/]*\)/|while/|body/|closed_call/|checkpoint/", "", f"{found[1]}") if found else ""
    return "/".join(words.split("/")[-3:])


class Event(NamedTuple):
    """An operation that a device, or a thread of the CPU, has done."""

    name: str
    seconds: float


def events(xplane: Path, names: Iterable[str]) -> Iterator[Event]:
    """The events of a trace that are instructions with these names: of the devices if it has them, else of the host."""
    known = frozenset(names)
    planes = [each for each in jax.profiler.ProfileData.from_file(str(xplane)).planes]
    on_devices = [each for each in planes if each.name.startswith("/device:")]
    found = [event for plane in on_devices for event in _of_plane(plane, known)]
    return iter(found or [event for plane in planes for event in _of_plane(plane, known)])


def _of_plane(plane: Any, known: frozenset[str]) -> Iterator[Event]:
    for line in plane.lines:
        for event in line.events:
            stats = dict(event.stats)
            # a TPU's events are named by the whole instruction
            name = str(stats.get("hlo_op") or event.name.partition(" = ")[0]).removeprefix("%")
            if name in known and not event.name.startswith("end: "):
                yield Event(name, event.duration_ns * 1e-9)


def summary(found: Iterable[Event], program: dict[str, Instruction], steps: int) -> dict[str, Any]:
    """`classes`: {class: seconds of a step, share}; `operations`: the ten that cost most. The sum over all devices."""
    spent: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    by_class: dict[str, float] = defaultdict(float)
    for event in found:
        spent[event.name] += event.seconds / steps
        calls[event.name] += 1
        by_class[program[event.name].kind] += event.seconds / steps
    total = sum(spent.values()) or 1.0
    costliest = sorted(spent, key=lambda name: -spent[name])[:SHOWN]
    return {
        "classes": {
            kind: {"seconds": each, "share": each / total}
            for kind, each in sorted(by_class.items(), key=lambda pair: -pair[1])
        },
        "operations": [
            {
                "name": name,
                "class": program[name].kind,
                "seconds": spent[name],
                "share": spent[name] / total,
                "calls": calls[name] / steps,
                "of": program[name].of,
            }
            for name in costliest
        ],
    }


def profiled(directory: Path, step: BenchStep, batch: Fed) -> dict[str, Any]:
    """Trace some steps into a directory, for Perfetto and XProf, and return the `summary` of it."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(str(directory), profiler_options=options):
        for _ in range(TRACED):
            step.follow(batch.placed)
    files = sorted(directory.glob("plugins/profile/*/*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise UserError(f"--profile={directory}: the profiler wrote no trace there")
    program = instructions(step.text())
    return {"directory": str(files[-1].parent), **summary(events(files[-1], program), program, TRACED)}

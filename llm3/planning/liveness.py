"""Liveness analysis: the memory and traffic of a program on one device, from its jax trace, without compiling.

The trace has the shapes of one device's share of a step. Three rules model how XLA fuses it into kernels:

1. Element-wise work is fused into its readers. Its result is written to memory only if a matmul, a gather, a loop or
   the end of the program reads it; until then its inputs stay alive.
2. The result of a matmul is fused with element-wise work that is its only reader, and written at its smallest point.
   A reduction needs it written first, as the maximum of the attention scores does.
3. Parameters and gradients are sharded. A device holds all of one while a matmul reads or makes it, or while the
   matmuls of a loop read slices of it, else its shard.

A loop holds its stacked outputs and the peak of its body.
"""

import math
from typing import Any, NamedTuple

from jax import memory
from jax.extend.core import Jaxpr, Literal

CALLS = {"jit", "pjit", "remat2", "checkpoint", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call"}
# ops that keep the elements, perhaps in another order
SAME = {"reshape", "squeeze", "transpose", "copy", "name", "stop_gradient", "sharding_constraint"}
SAME |= {"optimization_barrier"}
REDUCTIONS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "reduce_prod", "argmax", "argmin"}
LOOPS = {"scan", "while", "cond"}
UNSHARDED = {"dot_general", "conv_general_dilated", "gather", "scatter", "scatter-add"}  # read or make full parameters
IN_PLACE = {"scatter", "scatter-add", "dynamic_update_slice"} | LOOPS
KERNELS = UNSHARDED | IN_PLACE | REDUCTIONS | {"sort", "top_k", "cumsum"}


class Value:
    """An array of the program.

    given: it is an input. held: it is written to memory. gathered: each device holds the full array. of_matmul: a
    matmul fused with element-wise work writes it. roots: the inputs and held arrays that its readers read instead of
    it; a held array is its own root, but the root of a cast to a larger dtype is the array that it casts.
    """

    def __init__(self, variable: Any, given: bool = False):
        self.shape: tuple[int, ...] = tuple(getattr(variable.aval, "shape", ()))
        self.dtype = getattr(variable.aval, "dtype", None)
        self.itemsize: int = getattr(self.dtype, "itemsize", 4)
        on_device = getattr(variable.aval, "memory_space", None) != memory.Space.Host
        self.bytes = math.prod(self.shape) * self.itemsize * on_device
        self.given, self.held, self.gathered, self.of_matmul = given, False, False, False
        self.roots: frozenset[Value] = frozenset({self} if given else ())


class Op(NamedTuple):
    """An operation; a loop runs its `bodies` `times` times. flops: FLOPs if it is a matmul, else 0."""

    name: str
    reads: list[Value]
    writes: list[Value]
    bodies: list["Program"]
    times: int
    flops: float


class Program(NamedTuple):
    """Operations in order, the results, and the inputs."""

    ops: list[Op]
    results: list[Value]
    inputs: list[Value]


class Shares(NamedTuple):
    """The share of an array that a device holds.

    An array with an axis that `rows` divides is batched: a device holds `own` rows instead of `rows`, and one of
    `lengths` pieces of their length. Any other array is a parameter or similar, cut into `pieces`. rounds: of a loop
    of which only the data says when it ends.
    """

    rows: int
    own: float
    lengths: int
    pieces: int
    rounds: float = 1.0

    @property
    def share(self) -> float:
        """The share of a batched array."""
        return self.own / self.rows / self.lengths

    def batched(self, value: Value) -> bool:
        """Whether an array grows with the batch."""
        return any(size and size % self.rows == 0 for size in value.shape)

    def full_bytes(self, value: Value) -> float:
        """Bytes of an array while a matmul reads or makes it."""
        return value.bytes * (self.share if self.batched(value) else 1)

    def shard_bytes(self, value: Value) -> float:
        """Bytes of an array while no matmul uses it."""
        return self.full_bytes(value) if self.batched(value) or value.gathered else value.bytes / self.pieces

    def name(self, value: Value, size: float) -> str:
        """The dtype and shape of an array, and the number of shards if a device holds `size` bytes of it."""
        shape = [f"{n // self.rows * self.own:.3g}" if n and n % self.rows == 0 else str(n) for n in value.shape]
        share = round(math.prod(map(float, shape)) * value.itemsize / size) if size else 1
        return f"{value.dtype}[{','.join(shape)}]" + (f"/{share}" if share > 1 else "")


class Liveness(NamedTuple):
    """peak: peak bytes besides the inputs and the results that reuse their memory. largest: {dtype and shape: bytes}
    of the arrays alive at the peak. moved: bytes read and written. flops: FLOPs of the matmuls.
    """

    peak: float
    largest: dict[str, float]
    moved: float
    flops: float


def measure(jaxpr: Jaxpr, shares: Shares) -> Liveness:
    """The liveness of a traced program whose results reuse the memory of its inputs."""
    program = read(jaxpr, shares)
    return _measure(program, shares, frozenset(program.results))


def read(jaxpr: Jaxpr, shares: Shares) -> Program:
    """The program of a jaxpr, with calls inlined and without reorderings, repeated casts and unused operations."""
    ops: list[Op] = []
    inputs = [Value(each, given=True) for each in jaxpr.invars]
    results = _inline(jaxpr, inputs, ops, {}, shares)
    wanted, used = set(results), []
    for op in reversed(ops):
        if wanted.intersection(op.writes):
            wanted.update(op.reads)
            used.append(op)
    program = Program(used[::-1], results, inputs)
    _fuse(program, shares)
    return program


def _inline(jaxpr: Jaxpr, inputs: list[Value], ops: list[Op], casts: dict, shares: Shares) -> list[Value]:
    values = dict(zip(jaxpr.invars, inputs, strict=True)) | {each: Value(each, given=True) for each in jaxpr.constvars}

    def get(atom: Any) -> Value:
        return Value(atom) if isinstance(atom, Literal) else values[atom]

    for eqn in jaxpr.eqns:
        name, reads = eqn.primitive.name, [get(each) for each in eqn.invars]
        cast = (reads[0], eqn.params["new_dtype"]) if name == "convert_element_type" else None
        if name in CALLS:
            results = _inline(_programs(eqn.params)[0], reads, ops, casts, shares)
        elif name in SAME:
            results = reads
        elif cast in casts:
            results = [casts[cast]]
        else:
            results = [Value(each) for each in eqn.outvars]
            bodies = [read(each, shares) for each in _programs(eqn.params)] if name in LOOPS else []
            ops.append(Op(name, reads, results, bodies, eqn.params.get("length", 1), _flops(eqn)))
            casts |= {cast: results[0]} if cast else {}
        values |= zip(eqn.outvars, results, strict=True)
    return [get(each) for each in jaxpr.outvars]


def _programs(params: dict[str, Any]) -> list[Jaxpr]:
    """The jaxprs in the parameters of an equation."""
    flat = [each for value in params.values() for each in (value if isinstance(value, tuple | list) else (value,))]
    plain = [getattr(each, "jaxpr", each) for each in flat]  # a closed jaxpr holds one
    return [each for each in plain if isinstance(each, Jaxpr)]


def _flops(eqn: Any) -> float:
    if eqn.primitive.name != "dot_general":
        return 0.0
    contracted = eqn.params["dimension_numbers"][0][0]
    sizes = (*eqn.outvars[0].aval.shape, *(eqn.invars[0].aval.shape[axis] for axis in contracted))
    return 2.0 * math.prod(sizes)


def _fuse(program: Program, shares: Shares) -> None:
    """Decide which values are held, and set the roots of all values."""
    readers: dict[Value, list[Op]] = {}
    for op in program.ops:
        for value in set(op.reads):
            readers.setdefault(value, []).append(op)
    ends = set(program.results)
    for op in program.ops:
        for value in op.writes:
            read_by = {reader.name for reader in readers.get(value, [])}
            if op.name not in KERNELS or _is_select(op, shares):
                value.held |= value in ends or not read_by.isdisjoint(KERNELS - REDUCTIONS)
                value.gathered = value.held and not shares.batched(value) and not read_by.isdisjoint(UNSHARDED)
            elif value not in readers and value not in ends:
                continue
            elif op.name == "dot_general" and shares.batched(value):
                end = _smallest(value, readers, ends)
                end.held = end.of_matmul = True
            else:
                value.held = True
    for op in program.ops:
        roots = _roots(op)
        for value in op.writes:
            larger = op.name == "convert_element_type" and value.bytes > op.reads[0].bytes
            value.roots = frozenset({value}) if value.held and not larger else roots


def _is_select(op: Op, shares: Shares) -> bool:
    """Whether an operation is the gradient of a selection along a batched axis, which XLA compiles to a comparison."""
    return op.name == "scatter-add" and shares.batched(op.writes[0])


def _smallest(value: Value, readers: dict[Value, list[Op]], ends: set[Value]) -> Value:
    """The smallest value from the result of a matmul through the element-wise work that is its only reader."""
    chain = [value]
    while len(readers.get(value, [])) == 1 and value not in ends:
        reader = readers[value][0]
        if reader.name in KERNELS or len(reader.writes) != 1:
            break
        value = reader.writes[0]
        chain.append(value)
    return min(reversed(chain), key=lambda each: each.bytes)


def _roots(op: Op) -> frozenset[Value]:
    """The arrays that an operation reads, directly or through fused element-wise work."""
    reads_held = op.name in KERNELS - REDUCTIONS
    return frozenset().union(*({each} if reads_held and each.held else each.roots for each in op.reads))


def _needs_full(op: Op) -> bool:
    """Whether an operation reads full parameters or makes full gradients."""
    return op.name in UNSHARDED or any(value.of_matmul for value in op.writes)


def _sliced(op: Op, shares: Shares) -> set[Value]:
    """The parameters of which the matmuls of a scan read slices."""
    found = set()
    for body in op.bodies if op.name == "scan" else ():
        outer = dict(zip(body.inputs, op.reads, strict=True))
        slices = [inner for inner in body.ops if inner.name == "dynamic_slice" and inner.writes[0].gathered]
        found |= {outer[inner.reads[0]] for inner in slices if inner.reads[0] in outer}
    return {value for value in found if not shares.batched(value)}


def _overwrites(op: Op) -> bool:
    """Whether an operation writes into an array that a loop carries."""
    return op.name == "dynamic_update_slice" and op.reads[0].given


def _measure(program: Program, shares: Shares, elsewhere: frozenset[Value]) -> Liveness:
    """The liveness of one level of loops. elsewhere: results that are stored outside of it."""
    kernels = [op for op in program.ops if any(value.held for value in op.writes)]
    last = {root: index for index, op in enumerate(kernels) for root in _roots(op)}
    last |= dict.fromkeys(program.results, len(kernels))
    live: dict[Value, float] = {}
    peak, largest, moved = 0.0, {}, 0.0
    for index, op in enumerate(kernels):
        roots = _roots(op)
        new = [each for each in op.writes if each.held and each not in elsewhere and not _overwrites(op)]
        now = live | {value: shares.shard_bytes(value) for value in new}
        if full := _needs_full(op):
            cut = {value for value in roots if value.given and shares.pieces > 1 and not shares.batched(value)}
            now |= {value: shares.full_bytes(value) for value in (*roots & live.keys(), *cut, *new)}
        sliced = {value for value in _sliced(op, shares) if not value.given or shares.pieces > 1}
        now |= {value: shares.full_bytes(value) for value in sliced}
        inside = [_measure(body, shares, frozenset()) for body in op.bodies]
        deepest = max(inside, key=lambda each: each.peak, default=Liveness(0.0, {}, 0.0, 0.0))
        dying = [value for value in roots if value in live and last[value] == index]
        in_place = op.name in IN_PLACE or not (full or op.name in KERNELS)
        reused = _reused(dying, new, shares) if in_place else 0.0
        if (total := sum(now.values()) - reused + deepest.peak) > peak:
            peak, largest = total, dict(deepest.largest)
            for value, size in now.items():
                name = shares.name(value, size)
                largest[name] = largest.get(name, 0.0) + size
        moved += _moved(op, roots, shares) + op.times * _of_bodies(op, [each.moved for each in inside])
        live |= {value: shares.shard_bytes(value) for value in new}
        live = {value: size for value, size in live.items() if last.get(value, -1) > index}
    return Liveness(peak, dict(sorted(largest.items(), key=lambda each: -each[1])), moved, _all_flops(program, shares))


def _reused(dying: list[Value], new: list[Value], shares: Shares) -> float:
    """Bytes of new arrays that reuse the memory of arrays of the same size that are read for the last time."""
    free = [shares.shard_bytes(value) for value in dying]
    total = 0.0
    for size in (shares.shard_bytes(value) for value in new):
        if size in free:
            free.remove(size)
            total += size
    return total


def _moved(op: Op, roots: frozenset[Value], shares: Shares) -> float:
    """Bytes that a kernel reads and writes; 0 for a loop, whose body counts them."""
    if op.name in LOOPS:
        return 0.0
    size = shares.full_bytes if _needs_full(op) else shares.shard_bytes
    written = sum(map(size, op.reads[1:2] if op.name == "dynamic_update_slice" else op.writes))
    # these read or write only a part of an array
    in_part = op.name in ("gather", "dynamic_slice", "dynamic_update_slice")
    return 2 * written if in_part else written + sum(size(value) for value in roots)


def _all_flops(program: Program, shares: Shares) -> float:
    total = 0.0
    for op in program.ops:
        times = shares.rounds if op.name == "while" else op.times
        total += op.flops + times * _of_bodies(op, [_all_flops(body, shares) for body in op.bodies])
    return total


def _of_bodies(op: Op, each: list[float]) -> float:
    """What the bodies of an operation cost, of which a branch computes one."""
    return max(each) if op.name == "cond" else sum(each)

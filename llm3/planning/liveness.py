"""What one device holds and moves while it runs a program: from the program as jax traces it, before any compiler.

The trace has the shapes of one device's share of a step. How XLA makes kernels of it is modelled by three rules:

1. Element-wise work is done where its result is read. The result becomes an array only where a product, a gather, a
   loop or the end of the program reads it; until then, what it is computed from is kept.
2. What a product gives goes on through element-wise work that alone reads it, and is written where it is smallest.
   A reduction needs it written first: so the scores of attention are, for their maximum.
3. Of a parameter or a gradient, which are cut over devices, all is there where a product reads or makes it; elsewhere,
   a device has its piece.

A loop holds what it stacks, and what its body holds at most.
"""

import math
from typing import Any, NamedTuple

from jax.extend.core import Jaxpr, Literal

CALLS = {"jit", "pjit", "remat2", "checkpoint", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call"}
# the same elements, perhaps in another order
SAME = {"reshape", "squeeze", "transpose", "copy", "stop_gradient", "sharding_constraint", "optimization_barrier"}
REDUCTIONS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "reduce_prod", "argmax", "argmin"}
LOOPS = {"scan", "while", "cond"}
WHOLE = {"dot_general", "conv_general_dilated", "gather", "scatter", "scatter-add"}  # take or make whole parameters
IN_PLACE = {"scatter", "scatter-add", "dynamic_update_slice"} | LOOPS
KERNELS = WHOLE | IN_PLACE | REDUCTIONS | {"sort", "top_k", "cumsum"}


class Value:
    """An array of the program. given: it is an input. held: it is written to memory; gathered: by every device whole;
    of_product: by a product that ends in element-wise work.

    roots: the inputs and held arrays that it is computed from where it is read; of a held array, itself, but of a cast
    to a larger dtype, that from which it is cast.
    """

    def __init__(self, variable: Any, given: bool = False):
        self.shape: tuple[int, ...] = tuple(getattr(variable.aval, "shape", ()))
        self.dtype = getattr(variable.aval, "dtype", None)
        self.itemsize: int = getattr(self.dtype, "itemsize", 4)
        self.bytes = math.prod(self.shape) * self.itemsize
        self.given, self.held, self.gathered, self.of_product = given, False, False, False
        self.roots: frozenset[Value] = frozenset({self} if given else ())


class Op(NamedTuple):
    """An operation; a loop runs its `bodies` so many `times`. flops: of a product."""

    name: str
    reads: list[Value]
    writes: list[Value]
    bodies: list["Program"]
    times: int
    flops: float


class Program(NamedTuple):
    """Operations in order, and what is left at the end."""

    ops: list[Op]
    results: list[Value]


class Shares(NamedTuple):
    """How much of an array a device has.

    An array with an axis that `rows` divides has the batch in it: a device has `own` rows instead of so many, and of
    their length one of `lengths` pieces. Any other is a parameter or the like, cut into `pieces`.
    """

    rows: int
    own: float
    lengths: int
    pieces: int

    @property
    def share(self) -> float:
        """Of what is traced of the batch."""
        return self.own / self.rows / self.lengths

    def batched(self, value: Value) -> bool:
        """Whether an array grows with the batch."""
        return any(size and size % self.rows == 0 for size in value.shape)

    def whole(self, value: Value) -> float:
        """The bytes of an array where a product reads or makes it."""
        return value.bytes * (self.share if self.batched(value) else 1)

    def piece(self, value: Value) -> float:
        """The bytes of an array while it waits."""
        return self.whole(value) if self.batched(value) or value.gathered else value.bytes / self.pieces

    def name(self, value: Value, size: float) -> str:
        """An array's dtype and shape; of which a device has `size` bytes."""
        shape = [f"{n // self.rows * self.own:.3g}" if n and n % self.rows == 0 else str(n) for n in value.shape]
        share = round(math.prod(map(float, shape)) * value.itemsize / size) if size else 1
        return f"{value.dtype}[{','.join(shape)}]" + (f"/{share}" if share > 1 else "")


class Footprint(NamedTuple):
    """peak: the most bytes held at once, beside the inputs and what takes their place. largest: the arrays of that
    moment, {dtype and shape: bytes}, all of one name together. moved: bytes read and written. flops: of the products.
    """

    peak: float
    largest: dict[str, float]
    moved: float
    flops: float


def of(jaxpr: Jaxpr, shares: Shares) -> Footprint:
    """The footprint of a traced program whose results take the place of its inputs."""
    program = read(jaxpr, shares)
    return _measure(program, shares, frozenset(program.results))


def read(jaxpr: Jaxpr, shares: Shares) -> Program:
    """The program of a jaxpr: calls put in place, reorderings and casts made twice left out, and what is not used."""
    ops: list[Op] = []
    results = _inline(jaxpr, [Value(each, given=True) for each in jaxpr.invars], ops, {}, shares)
    wanted, used = set(results), []
    for op in reversed(ops):
        if wanted.intersection(op.writes):
            wanted.update(op.reads)
            used.append(op)
    program = Program(used[::-1], results)
    _fuse(program, shares)
    return program


def _inline(jaxpr: Jaxpr, inputs: list[Value], ops: list[Op], casts: dict, shares: Shares) -> list[Value]:
    values = dict(zip(jaxpr.invars, inputs, strict=True)) | {each: Value(each, given=True) for each in jaxpr.constvars}

    def get(atom: Any) -> Value:
        return Value(atom) if isinstance(atom, Literal) else values[atom]

    for eqn in jaxpr.eqns:
        name, reads = eqn.primitive.name, [get(each) for each in eqn.invars]
        cast = (reads[0], eqn.outvars[0].aval.dtype) if name == "convert_element_type" else None
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
    """The jaxprs among the parameters of an equation."""
    flat = [each for value in params.values() for each in (value if isinstance(value, tuple | list) else (value,))]
    plain = [getattr(each, "jaxpr", each) for each in flat]  # of a closed one
    return [each for each in plain if isinstance(each, Jaxpr)]


def _flops(eqn: Any) -> float:
    if eqn.primitive.name != "dot_general":
        return 0.0
    contracted = eqn.params["dimension_numbers"][0][0]
    sizes = (*eqn.outvars[0].aval.shape, *(eqn.invars[0].aval.shape[axis] for axis in contracted))
    return 2.0 * math.prod(sizes)


def _fuse(program: Program, shares: Shares) -> None:
    """Decide which values are held, and what the others are computed from."""
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
                value.gathered = value.held and not shares.batched(value) and not read_by.isdisjoint(WHOLE)
            elif value not in readers and value not in ends:
                continue
            elif op.name == "dot_general" and shares.batched(value):
                end = _smallest(value, readers, ends)
                end.held = end.of_product = True
            else:
                value.held = True
    for op in program.ops:
        roots = _roots(op)
        for value in op.writes:
            larger = op.name == "convert_element_type" and value.bytes > op.reads[0].bytes
            value.roots = frozenset({value}) if value.held and not larger else roots


def _is_select(op: Op, shares: Shares) -> bool:
    """Whether it is the gradient of a choice along an axis of the batch, which compiles to a comparison of indices."""
    return op.name == "scatter-add" and shares.batched(op.writes[0])


def _smallest(value: Value, readers: dict[Value, list[Op]], ends: set[Value]) -> Value:
    """Where on its way through element-wise work that alone reads it the result of a product is smallest."""
    chain = [value]
    while len(readers.get(value, [])) == 1 and value not in ends:
        reader = readers[value][0]
        if reader.name in KERNELS or len(reader.writes) != 1:
            break
        value = reader.writes[0]
        chain.append(value)
    return min(reversed(chain), key=lambda each: each.bytes)


def _roots(op: Op) -> frozenset[Value]:
    """The arrays that an operation reads, or the element-wise work that leads to it."""
    as_it_is = op.name in KERNELS - REDUCTIONS
    return frozenset().union(*({each} if as_it_is and each.held else each.roots for each in op.reads))


def _takes_whole(op: Op) -> bool:
    """Whether it needs all of a parameter, or makes all of a gradient."""
    return op.name in WHOLE or any(value.of_product for value in op.writes)


def _measure(program: Program, shares: Shares, elsewhere: frozenset[Value]) -> Footprint:
    """The footprint of one level of loops; elsewhere: results that have their place outside of it."""
    kernels = [op for op in program.ops if any(value.held for value in op.writes)]
    last = {root: place for place, op in enumerate(kernels) for root in _roots(op)}
    last |= dict.fromkeys(program.results, len(kernels))
    live: dict[Value, float] = {}
    peak, largest, moved = 0.0, {}, 0.0
    for place, op in enumerate(kernels):
        roots, new = _roots(op), [each for each in op.writes if each.held and each not in elsewhere]
        now = live | {value: shares.piece(value) for value in new}
        if whole := _takes_whole(op):
            cut = {value for value in roots if value.given and shares.pieces > 1 and not shares.batched(value)}
            now |= {value: shares.whole(value) for value in (*roots & live.keys(), *cut, *new)}
        inside = [_measure(body, shares, frozenset()) for body in op.bodies]
        deepest = max(inside, key=lambda each: each.peak, default=Footprint(0.0, {}, 0.0, 0.0))
        dying = [value for value in roots if value in live and last[value] == place]
        in_place = op.name in IN_PLACE or not (whole or op.name in KERNELS)
        reused = _reused(dying, new, shares) if in_place else 0.0
        if (total := sum(now.values()) - reused + deepest.peak) > peak:
            peak, largest = total, dict(deepest.largest)
            for value, size in now.items():
                name = shares.name(value, size)
                largest[name] = largest.get(name, 0.0) + size
        moved += _moved(op, roots, shares) + op.times * sum(each.moved for each in inside)
        live |= {value: shares.piece(value) for value in new}
        live = {value: size for value, size in live.items() if last.get(value, -1) > place}
    flops = sum(op.flops + op.times * sum(_all_flops(body) for body in op.bodies) for op in program.ops)
    return Footprint(peak, dict(sorted(largest.items(), key=lambda each: -each[1])), moved, flops)


def _reused(dying: list[Value], new: list[Value], shares: Shares) -> float:
    """The bytes of new arrays that take the place of arrays of the same size that are read for the last time."""
    free = [shares.piece(value) for value in dying]
    total = 0.0
    for size in (shares.piece(value) for value in new):
        if size in free:
            free.remove(size)
            total += size
    return total


def _moved(op: Op, roots: frozenset[Value], shares: Shares) -> float:
    """The bytes that a kernel reads and writes; what a loop does is its body's."""
    if op.name in LOOPS:
        return 0.0
    size = shares.whole if _takes_whole(op) else shares.piece
    written = sum(size(value) for value in op.writes)
    # of a table, only rows are read
    return 2 * written if op.name == "gather" else written + sum(size(value) for value in roots)


def _all_flops(program: Program) -> float:
    return sum(op.flops + op.times * sum(_all_flops(body) for body in op.bodies) for op in program.ops)

"""What is read of a scheduled program: its collectives, how often they run, and what runs meanwhile."""

from llm3.cli.plan_topology import collectives_table
from llm3.planning.hlo import Found, collectives
from llm3.planning.roofline import Collective

# a loop of three rounds, as XLA writes one for a TPU: a gather on a SparseCore during a matmul, one during a copy, a
# fusion that scatters the sum of what it reads, and a gather that nothing runs beside
PROGRAM = """\
HloModule step, is_scheduled=true

%gather_of (x: bf16[2,8]) -> bf16[16,8] {
  %x = bf16[2,8]{1,0} parameter(0)
  ROOT %all-gather.9 = bf16[16,8]{1,0} all-gather(%x), channel_id=1, dimensions={0}
}, execution_thread="sparsecore"

%offloaded (x.1: bf16[2,8]) -> bf16[16,8] {
  %x.1 = bf16[2,8]{1,0} parameter(0)
  ROOT %call = bf16[16,8]{1,0} custom-call(%x.1), custom_call_target="offloaded", called_computations={%gather_of}
}, execution_thread="sparsecore"

%all-reduce-scatter.1 (y: f32[16,8]) -> f32[2,8] {
  %y = f32[16,8]{1,0} parameter(0)
  %all-reduce.3 = f32[16,8]{1,0} all-reduce(%y), channel_id=2, to_apply=%add
  ROOT %slice = f32[2,8]{1,0} slice(%all-reduce.3), slice={[0:2], [0:8]}
}

%matmul (a: bf16[8,8]) -> f32[8,8] {
  %a = bf16[8,8]{1,0} parameter(0)
  ROOT %convolution.1 = f32[8,8]{1,0} convolution(%a, %a), dim_labels=bf_io->bf
}

%body (p: (s32[], bf16[2,8])) -> (s32[], bf16[2,8]) {
  %p = (s32[], bf16[2,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %w = bf16[2,8]{1,0} get-tuple-element(%p), index=1
  %first-start = ((), (), (s32[8]{0}, /*index=5*/s32[1]{0})) async-start(), calls=%offloaded
  %early = f32[8,8]{1,0} fusion(%w), kind=kOutput, calls=%matmul
  %first-update = ((bf16[2,8]{1,0}), bf16[16,8]{1,0}, (s32[8]{0})) async-update(%first-start, %w), calls=%offloaded
  %copied = bf16[2,8]{1,0} copy(%w)
  %first-done = bf16[16,8]{1,0} async-done(%first-update)
  %second-start = (bf16[2,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%w), channel_id=3, dimensions={0}
  %product = f32[8,8]{1,0} fusion(%first-done), kind=kOutput, calls=%matmul
  %second-done = bf16[16,8]{1,0} all-gather-done(%second-start)
  %scattered = f32[2,8]{1,0} fusion(%product), kind=kCustom, calls=%all-reduce-scatter.1
  %third = bf16[16,8]{1,0} all-gather(%w), channel_id=4, dimensions={0}
  ROOT %next = (s32[], bf16[2,8]{1,0}) tuple(%i, %copied)
}

%condition (q: (s32[], bf16[2,8])) -> pred[] {
  %q = (s32[], bf16[2,8]{1,0}) parameter(0)
  %three = s32[]{:T(128)} constant(3)
  %j = s32[] get-tuple-element(%q), index=0
  ROOT %less = pred[] compare(%j, %three), direction=LT
}

ENTRY %main (r: (s32[], bf16[2,8])) -> (s32[], bf16[2,8]) {
  %r = (s32[], bf16[2,8]{1,0}) parameter(0)
  %norm = f32[] all-reduce(%r), channel_id=5, to_apply=%add
  ROOT %loop = (s32[], bf16[2,8]{1,0}) while(%r), condition=%condition, body=%body
}
"""


def test_collectives_of_a_scheduled_program():
    gather, scatter = 16 * 8 * 2, 16 * 8 * 4
    assert collectives(PROGRAM) == [
        Found("all-gather", gather, 3, starts_early=True, overlaps=False),  # the matmul runs before it has its operand
        Found("all-gather", gather, 3, starts_early=True, overlaps=True),
        Found("reduce-scatter", scatter, 3, starts_early=False, overlaps=False),
        Found("all-gather", gather, 3, starts_early=False, overlaps=False),
    ]


def test_the_plan_compares_their_bytes_and_says_what_share_overlaps():
    gib = 2**30
    planned = [Collective("fsdp", "x", "all-gather", gib, 2), Collective("data", "x", "all-reduce", gib, 1)]
    found = [Found("all-gather", gib // 4, 3, True, True), Found("all-gather", gib // 4, 1, False, False)]
    grid = collectives_table(planned, [*found, Found("all-reduce", gib, 1, True, False)])
    rows = list(zip(*(column.cells for column in grid.columns), strict=True))
    assert rows == [
        ("all-gather", "2.00", "1.00", "2.000", "4", "75.0 %", "75.0 %"),
        ("reduce-scatter", "0.00", "0.00", "-", "0", "-", "-"),
        ("all-reduce", "1.00", "1.00", "1.000", "1", "100.0 %", "0.0 %"),
        ("in all, an all-reduce as two", "4.00", "3.00", "1.333", "5", "80.0 %", "25.0 %"),
    ]

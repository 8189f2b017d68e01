"""What a profile says of a program: the class of each operation, and where the time of a traced step goes."""

import jax
import jax.numpy as jnp
import pytest

from llm3.cli.bench import operations
from llm3.cli.bench.operations import Event, instructions, summary

HLO = """HloModule jit_train_step, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%fused (p: f32[8,8], q: f32[8,8]) -> f32[8,8] {
  %p = f32[8,8]{1,0} parameter(0)
  %q = f32[8,8]{1,0} parameter(1)
  %dot.9 = f32[8,8]{1,0} dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %tanh.1 = f32[8,8]{1,0} tanh(%dot.9)
}

%moved (r: f32[8,8]) -> f32[8,8] {
  %r = f32[8,8]{1,0} parameter(0)
  %two = s32[] constant(2)
  %next = s32[] add(%two, %two)
  ROOT %t = f32[8,8]{0,1} transpose(%r), dimensions={1,0}
}

%halved (s: f32[8,8]) -> f32[8] {
  %s = f32[8,8]{1,0} parameter(0)
  %zero = f32[] constant(0)
  ROOT %r.1 = f32[8]{0} reduce(%s, %zero), dimensions={1}, to_apply=%sum
}

ENTRY %main (x: f32[8,8], y: f32[8,8]) -> (f32[8,8], f32[8]) {
  %x = f32[8,8]{1,0:T(8,128)} parameter(0)
  %y = f32[8,8]{1,0} parameter(1)
  %big.1 = f32[8,8]{1,0} fusion(%x, %y), kind=kCustom, calls=%fused, metadata={op_name="jit(f)/mlp/dot_general"}
  %move.2 = f32[8,8]{0,1} fusion(%big.1), kind=kLoop, calls=%moved
  %half.3 = f32[8]{0} fusion(%move.2), kind=kInput, calls=%halved
  %gather.4 = f32[8,8]{1,0} all-gather-start(%x), dimensions={0}
  %gemm.5 = (f32[8,8]{1,0}, s8[4]{0}) custom-call(%x), custom_call_target="cublas$gemm", metadata={op_name="attention"}
  %flash.6 = f32[8,8]{1,0} custom-call(%x), custom_call_target="__cudnn$fmhaSoftmax"
  %kernel.7 = f32[8,8]{1,0} custom-call(%x), custom_call_target="triton", metadata={op_name="f/flash/call"}
  %plus.8 = f32[8,8]{1,0} add(%x, %y)
  ROOT %out = (f32[8,8]{0,1}, f32[8]{0}) tuple(%move.2, %half.3)
}
"""


def test_an_operation_has_the_class_of_what_it_contains_or_calls():
    found = {name: each.kind for name, each in instructions(HLO).items()}
    assert {name: found[name] for name in found if "." in name and name not in ("dot.9", "tanh.1", "r.1")} == {
        "big.1": "matmul",
        "move.2": "copy",
        "half.3": "reduction",
        "gather.4": "collective",
        "gemm.5": "matmul",  # also where attention calls it
        "flash.6": "attention",
        "kernel.7": "attention",
        "plus.8": "elementwise",
    }
    assert "out" not in found and "x" not in found
    assert instructions(HLO)["big.1"].of == "mlp/dot_general"


def test_a_summary_is_of_one_step_and_has_the_costliest_first():
    events = [Event("big.1", 0.2), Event("big.1", 0.4), Event("half.3", 0.1), Event("gemm.5", 0.3)]
    found = summary(events, instructions(HLO), steps=2)
    assert found["classes"]["matmul"] == {"seconds": pytest.approx(0.45), "share": pytest.approx(0.9)}
    assert [(each["name"], each["calls"]) for each in found["operations"]] == [
        ("big.1", 1),
        ("gemm.5", 0.5),
        ("half.3", 0.5),
    ]
    assert sum(each["share"] for each in found["classes"].values()) == pytest.approx(1)


def test_a_trace_of_the_cpu_has_the_operations_of_a_loop_and_not_the_loop(tmp_path):
    def step(x):
        return jax.lax.scan(lambda x, _: (jnp.sort(x @ x, axis=-1), None), x, None, length=3)[0]

    x = jnp.ones((64, 64))
    compiled = jax.jit(step).lower(x).compile()

    class Step:
        text = compiled.as_text

        def follow(self, batch):
            jax.block_until_ready(compiled(batch))

    class Batch:
        placed = x

    found = operations.profiled(tmp_path, Step(), Batch())
    calls = {each["class"]: each["calls"] for each in found["operations"]}
    assert calls["matmul"] == 3 and calls["sort"] >= 3
    assert sum(each["share"] for each in found["classes"].values()) == pytest.approx(1)
    assert list(tmp_path.rglob("*.trace.json.gz"))

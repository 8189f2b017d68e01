"""The options of XLA that a train step is compiled with."""

import types

import jax
import jax.numpy as jnp
import pytest

from llm3.distributed import compiler_options
from llm3.distributed.compiler_options import GPU, OPTIONS, StepOptions, known, step_options
from tests.helpers.meshes import mesh_of

UNKNOWN = "xla_gpu_enable_what_no_version_has"


def mesh_on(platform: str, kind: str, devices: int = 2):
    device = types.SimpleNamespace(platform=platform, device_kind=kind, process_index=0)
    return types.SimpleNamespace(devices=types.SimpleNamespace(flat=[device] * devices))


@pytest.fixture
def chosen(monkeypatch):
    """The options for a mesh on devices that are not here, before any compiler is asked."""
    monkeypatch.setattr(compiler_options, "known", lambda wanted, device: StepOptions(dict(wanted)))
    return lambda *args: step_options(mesh_on(*args)).used


def test_a_cpu_and_a_single_device_have_none(chosen):
    assert step_options(mesh_of(8, data=8)) == step_options(mesh_of(1)) == ({}, ())
    assert chosen("gpu", "NVIDIA H100 80GB HBM3", 1) == {}


def test_each_kind_of_tpu_has_the_collectives_that_it_can_overlap(chosen):
    offload, fused = (
        "xla_tpu_enable_sparse_core_collective_offload_all_gather",
        "xla_tpu_enable_async_collective_fusion",
    )
    for kind in ("TPU v5", "TPU v5p", "TPU v6 lite", "TPU7x"):
        assert chosen("tpu", kind)[offload] and fused not in chosen("tpu", kind)
    for kind in ("TPU v5 lite", "TPU v5e"):
        assert chosen("tpu", kind)[fused] and offload not in chosen("tpu", kind)
    for options in OPTIONS["tpu"].values():
        assert options["xla_tpu_enable_latency_hiding_scheduler"]


def test_an_option_that_the_user_sets_is_left_to_them(chosen, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_pipelined_all_reduce=false")
    assert chosen("gpu", "NVIDIA H100 80GB HBM3").keys() == GPU.keys() - {"xla_gpu_enable_pipelined_all_reduce"}
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_enable_latency_hiding_scheduler=false")
    assert "xla_tpu_enable_latency_hiding_scheduler" not in chosen("tpu", "TPU v4")


def test_this_jax_knows_all_options_of_gpus():
    assert known(tuple(GPU.items()), jax.devices()[0]) == (GPU, ())


def test_an_option_that_the_compiler_does_not_know_is_left_out_and_named():
    found = known(((UNKNOWN, True), *GPU.items()), jax.devices()[0])
    assert found.used == GPU
    assert found.notes == (f"this XLA has no option {UNKNOWN}: collectives may overlap less",)
    jax.jit(jnp.negative, compiler_options=found.used)(1.0)


def test_options_that_the_compiler_refuses_are_left_out_and_its_reason_is_named():
    found = known((("xla_gpu_enable_latency_hiding_scheduler", "neither true nor false"),), jax.devices()[0])
    assert found.used == {}
    assert found.notes[0].startswith("XLA refuses the options for overlapping collectives: ")

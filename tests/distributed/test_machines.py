"""Hardware by name: its rates, rejected names, and the links along each mesh axis."""

import math

import pytest

from llm3.distributed.machines import CHIPS, EXAMPLES, Link, links, parse, peak_flops, unknown_peak
from llm3.errors import UserError


@pytest.mark.parametrize(
    ("text", "devices", "hosts", "shape"),
    [
        ("h100x8", 8, 1, ()),
        ("h100x64", 64, 8, ()),
        ("a100x1", 1, 1, ()),
        ("v5p:8x8x4", 256, 64, (8, 8, 4)),
        ("v5e:16x16", 256, 64, (16, 16)),
    ],
)
def test_a_topology_is_its_chips(text, devices, hosts, shape):
    machine = parse(text)
    assert (machine.devices, machine.hosts, machine.shape) == (devices, hosts, shape)
    assert text.startswith(machine.chip.name)


@pytest.mark.parametrize("text", EXAMPLES)
def test_every_example_is_one(text):
    assert parse(text).name == text


def test_the_cpu_is_this_machine_as_measured():
    chip = parse("cpu").chip
    assert chip.host == parse("cpu").devices == 1
    assert 2**28 < chip.memory < 2**45
    assert 1e8 < chip.peak < 1e14 and 1e8 < chip.bandwidth < 1e13


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("h100", "expected its device count, as in 'h100x8'"),
        ("v5p", "expected its torus shape, as in 'v5p:8x8x8'"),
        ("h1000x8", "no such chip; did you mean 'h100'"),
        ("v5:2x2x1", "no such chip; did you mean 'v5[ep]' or 'v5[ep]'"),
        ("tpu", "no such chip; .*valid: .*v5p"),
        ("cpux2", "no such chip; did you mean 'cpu'"),
        ("h100:8", "expected its device count"),
        ("v5p:4x4", "a torus of 3 dimensions, as in 'v5p:8x8x8'"),
        ("v5e:4x4x4", "a torus of 2 dimensions"),
        ("v5px8", "expected its torus"),
        ("h100x12", "expected 1 to 8 devices, or a multiple of 8"),
        ("h100x0", "expected 1 to 8 devices"),
    ],
)
def test_an_unknown_topology_is_rejected_with_the_nearest_right_one(text, complaint):
    with pytest.raises(UserError, match=complaint):
        parse(text)


def test_the_peaks_are_those_of_the_one_table():
    for name, kind in {
        "h100": "NVIDIA H100 80GB HBM3",
        "b200": "NVIDIA B200",
        "v5p": "TPU v5p",
        "v6e": "TPU v6e",
    }.items():
        assert CHIPS[name].peak == peak_flops(kind)


@pytest.mark.parametrize(
    ("kind", "peak"),  # TFLOP/s in bfloat16 without sparsity, as the vendors state them
    [
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181.05),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA A10", 125),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("TPU v5 lite", 197),
        ("TPU v5p", 459),
        ("TPU7x", 2307 / 2),
    ],
)
def test_the_peak_rate_is_that_of_the_exact_device(kind, peak):
    assert peak_flops(kind) == peak * 1e12 and unknown_peak(kind) is None


@pytest.mark.parametrize("kind", ["NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA A10G", "NVIDIA H20", "TPU v9", "NVIDIA"])
def test_a_device_of_another_name_is_unknown_and_says_so(kind):
    assert peak_flops(kind) is None
    assert repr(kind) in unknown_peak(kind) and "no MFU" in unknown_peak(kind)
    assert peak_flops("cpu") is None and unknown_peak("cpu") is None


def test_gpus_are_linked_inside_of_a_host_and_over_the_network_between_hosts():
    of = links(parse("h100x64"), {"data": 2, "fsdp": 8, "tensor": 4})
    assert (of["tensor"].size, of["tensor"].hosts) == (4, 1)
    # two pieces of fsdp in each host, with a network adapter each
    assert (of["fsdp"].size, of["fsdp"].hosts, of["fsdp"].between) == (8, 4, 2 * 50e9)
    assert (of["data"].size, of["data"].hosts, of["data"].between) == (2, 2, 50e9)


def test_only_the_axis_across_hosts_spans_the_hosts():
    of = links(parse("h100x16"), {"data": 1, "fsdp": 8, "tensor": 2}, across_hosts="tensor")
    assert {axis: link.hosts for axis, link in of.items()} == {"data": 1, "fsdp": 1, "context": 1, "tensor": 2}
    with pytest.raises(UserError, match=r"mesh\.fsdp is 1: expected a multiple of 2"):
        links(parse("h100x16"), {"data": 16}, across_hosts="fsdp")
    with pytest.raises(UserError, match="no such mesh axis"):
        links(parse("h100x16"), {"data": 16}, across_hosts="host")


def test_a_tpu_axis_takes_the_dimensions_of_the_torus_that_multiply_to_it():
    of = links(parse("v5p:8x8x4"), {"data": 8, "fsdp": 32})
    assert of["fsdp"].inside == 2 * 2 * 100e9  # two rings, in both directions
    assert of["data"].inside == 2 * 100e9
    assert links(parse("v5p:2x2x1"), {"fsdp": 4})["fsdp"].inside == 2 * 100e9  # lines, that do not close
    assert links(parse("v5e:16x16"), {"data": 16, "tensor": 16})["tensor"].inside == 2 * 50e9


def test_a_mesh_that_does_not_fit_is_rejected_as_for_devices():
    with pytest.raises(UserError, match="does not fit 64 devices"):
        links(parse("h100x64"), {"data": 3, "fsdp": -1})


def test_a_gather_costs_the_slower_of_host_and_network():
    link = Link("", 64, 8, 400e9, 8 * 50e9)
    inside, between = 1e9 * 63 / 64 / 400e9, 1e9 * 7 / 8 / 400e9
    assert link.gather_seconds(1e9) == pytest.approx(max(inside, between))
    slow = link._replace(between=50e9)
    assert slow.gather_seconds(1e9) == pytest.approx(1e9 * 7 / 8 / 50e9)
    assert link._replace(size=1, hosts=1).gather_seconds(1e9) == 0
    assert math.isfinite(Link("", 1, 1, 1.0, 0.0).gather_seconds(1))

"""Whether freed pages are kept, told without jax."""

import os
import subprocess
import sys

import pytest

from llm3.distributed import allocator

# Ten buffers of 64 MiB, one after another: how many of them the kernel gave, by pages of 4 KiB.
FAULTS = """
import ctypes, resource
from llm3.distributed import allocator

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a huge page would be one fault of many
kept = allocator.keep_freed_pages()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    bytearray(b"x") * 2**26
print(kept, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * 4096 // 2**26)
"""


@pytest.mark.parametrize(("variables", "kept"), [({}, True), ({"MALLOC_ARENA_MAX": "2"}, False)])
def test_a_freed_buffer_is_used_again_unless_the_environment_sets_up_the_allocator(variables, kept):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment |= {"JAX_PLATFORMS": "cpu"} | variables
    answer = subprocess.run([sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True)
    said, given = answer.stdout.split()
    assert said == str(kept), answer.stderr
    assert int(given) <= 1 if kept else int(given) >= 9


@pytest.mark.parametrize(
    ("environment", "files", "expected"),
    [
        ({}, [], False),
        ({}, ["dev/nvidiactl"], True),
        ({}, ["dev/vfio/0"], True),
        ({"JAX_PLATFORMS": "cpu"}, ["dev/nvidiactl"], False),
        ({"JAX_PLATFORMS": "cuda,cpu"}, [], True),
        ({"LLM3_ACCELERATOR": "tpu"}, [], True),
    ],
)
def test_an_accelerator_is_told_by_what_is_asked_for_or_else_by_its_device_files(
    environment, files, expected, tmp_path
):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    assert allocator.has_accelerator(environment, tmp_path) is expected

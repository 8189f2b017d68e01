"""Eight fake devices and quick compilation, before any test starts a backend."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and compute little: without it the suite takes about twice as long.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


def pytest_terminal_summary(terminalreporter):
    """The logs of SLURM jobs, so that a run of the suite shows them."""
    for report in terminalreporter.stats.get("passed", []):
        for name, text in report.user_properties:
            if name == "log":
                terminalreporter.write_line(text)


@pytest.fixture
def one_device():
    from tests.helpers.meshes import mesh_of

    return mesh_of(1)


@pytest.fixture
def eight_devices():
    from tests.helpers.meshes import mesh_of

    return mesh_of(8, data=2, fsdp=2, tensor=2)

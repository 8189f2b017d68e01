"""Eight fake devices and quick compilation, before any test starts a backend; and what the tests cost."""

import collections
import functools
import os
import shutil
import tempfile

from tests.helpers import forks

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and compute little: without it the suite takes about twice as long.
os.environ.setdefault("XLA_FLAGS", forks.FLAGS)

import jax
import pytest

from llm3.data.cache.place import VARIABLE
from llm3.distributed import allocator

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_compilation_cache", False)  # no files in workdirs; processes of tests share a folder

COMPILED = "LLM3_TEST_COMPILED"  # a directory for what processes of tests have compiled, of one run of the suite
SPENT = pytest.StashKey[float]()


def pytest_configure(config):
    """Directories for all workers, which inherit the environment of the process that starts them."""
    config.stash[SPENT] = cpu_seconds()
    allocator.keep_freed_pages()
    if not hasattr(config, "workerinput"):
        for variable in (COMPILED, VARIABLE):  # the cache of tests that name none: never that of the user
            directory = os.environ[variable] = tempfile.mkdtemp(prefix="llm3-test-")
            config.add_cleanup(functools.partial(shutil.rmtree, directory, ignore_errors=True))


def pytest_collection_finish():
    forks.seldom_collect_garbage()


def cpu_seconds() -> float:
    """User and system time of this process and of its children that have ended, those of a running server as well."""
    return sum(os.times()[:4]) + forks.cpu_seconds


def pytest_sessionfinish():
    forks.stop()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """Note the CPU time of a test's setup, call and teardown; that of collection goes to the first one."""
    report, now = (yield), cpu_seconds()
    report.cpu_seconds, item.config.stash[SPENT] = now - item.config.stash[SPENT], now
    return report


def pytest_terminal_summary(terminalreporter):
    """The logs of SLURM jobs, and what was spent: in all, and on the ten slowest files."""
    reports = [each for some in terminalreporter.stats.values() for each in some if hasattr(each, "cpu_seconds")]
    for report in reports:
        for name, text in report.user_properties:
            if name == "log" and report.when == "call":
                terminalreporter.write_line(text)
    spent = collections.Counter()
    for report in reports:
        spent[report.location[0]] += report.cpu_seconds
    total = sum(os.times()[:4]) / 60  # with the workers, which have ended
    terminalreporter.section(f"{total:.1f} CPU minutes (user + system); the ten slowest files")
    for file, seconds in spent.most_common(10):
        terminalreporter.write_line(f"{seconds:6.1f} s  {file}")


@pytest.fixture
def one_device():
    from tests.helpers.meshes import mesh_of

    return mesh_of(1)


@pytest.fixture
def eight_devices():
    from tests.helpers.meshes import mesh_of

    return mesh_of(8, data=2, fsdp=2, tensor=2)

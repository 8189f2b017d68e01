"""Processes that need not import llm3 first: each is forked from a server that has.

`python forks.py` is that server: a request a line, in JSON, and an answer a line. A fork goes on in `tiny_run.run`.
"""

import gc
import importlib
import importlib.metadata
import json
import os
import pathlib
import pkgutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Mapping, Sequence
from typing import Any

# To compile quickly rather than well: about half of the time with the older emitters of code, where jaxlib has them.
OLD_EMITTERS = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11)
FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1" + " --xla_cpu_use_fusion_emitters=false" * OLD_EMITTERS
)
ROOT = pathlib.Path(__file__).parents[2]
_server: subprocess.Popen | None = None
cpu_seconds = 0.0  # user and system time of all forks that have ended


def environment(devices: int = 1) -> dict[str, str]:
    """Of a process on so many CPU devices. What it compiles, nearly without optimising, is kept for the others."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": FLAGS,
        "JAX_COMPILATION_CACHE_DIR": os.environ["LLM3_TEST_COMPILED"],
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONUNBUFFERED": "1",  # so that what a process said before it was killed is heard
    }


class Fork:
    """A process as `subprocess.Popen` has it: `tiny_run` with some arguments."""

    returncode: int | None = None

    def __init__(self, arguments: Sequence[str], variables: Mapping[str, str] | None = None, devices: int = 1):
        self._texts = [tempfile.NamedTemporaryFile("r", errors="replace") for _ in range(2)]  # noqa: SIM115
        stdout, stderr = (each.name for each in self._texts)
        request = {
            "variables": dict(variables or {}),
            "devices": devices,
            "stdout": stdout,
            "stderr": stderr,
            "directory": os.getcwd(),
        }
        self.pid = _ask({"arguments": list(arguments), **request})["pid"]

    def communicate(self, timeout: float) -> tuple[str, str]:
        """What it said, once it has ended. Raises TimeoutExpired."""
        global cpu_seconds
        if self.returncode is None:
            ended = _ask({"wait": self.pid, "seconds": timeout})
            stdout, stderr = (each.read() for each in self._texts)
            if ended["status"] is None:
                raise subprocess.TimeoutExpired(str(self.pid), timeout, stdout, stderr)
            self.returncode, cpu_seconds = ended["status"], cpu_seconds + ended["cpu_seconds"]
            self._said = stdout, stderr
        return self._said

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
        self.communicate(60)


def _ask(request: dict[str, Any]) -> dict[str, Any]:
    """The server's answer; it is started at the first request."""
    global _server
    if _server is None:
        pipe = subprocess.PIPE
        _server = subprocess.Popen([sys.executable, __file__], env=environment(), stdin=pipe, stdout=pipe, text=True)
    _server.stdin.write(json.dumps(request) + "\n")
    _server.stdin.flush()
    return json.loads(_server.stdout.readline())


def stop() -> None:
    """End the server, if there is one."""
    if _server is not None:
        _server.stdin.close()
        _server.wait()


def _serve() -> list[str]:
    """Answer requests until there are no more; in a fork, return its arguments."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    while line := sys.stdin.readline():
        request = json.loads(line)
        if "wait" in request:
            answers.write(json.dumps(_wait(request["wait"], request["seconds"])) + "\n")
        elif pid := os.fork():
            answers.write(json.dumps({"pid": pid}) + "\n")
        else:
            answers.close()
            _become(request)
            return request["arguments"]
    sys.exit()


def _wait(pid: int, seconds: float) -> dict[str, Any]:
    end, client = time.monotonic() + seconds, os.getppid()
    while True:
        if os.getppid() != client:  # it was killed, and nobody waits any more
            os.kill(pid, signal.SIGKILL)
            sys.exit()
        ended, status, used = os.wait4(pid, os.WNOHANG)
        if ended:
            return {"status": os.waitstatus_to_exitcode(status), "cpu_seconds": used.ru_utime + used.ru_stime}
        if time.monotonic() > end:
            return {"status": None}
        time.sleep(0.02)


def _become(request: dict[str, Any]) -> None:
    """Take the streams, the variables and the number of devices of a request."""
    import jax

    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream, number in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(request[stream], os.O_WRONLY), number)
    os.chdir(request["directory"])
    os.environ.update(request["variables"])
    jax.config.update("jax_num_cpu_devices", request["devices"])
    keep_what_any_process_compiles()


def keep_what_any_process_compiles() -> None:
    """Of several processes, jax lets only the first one write what it has compiled; each needs programs of its own."""
    from jax._src import compiler

    if write := getattr(compiler, "_cache_write", None):
        first = types.SimpleNamespace(global_state=types.SimpleNamespace(process_id=0))
        compiler._cache_write = types.FunctionType(write.__code__, vars(compiler) | {"distributed": first})


def seldom_collect_garbage() -> None:
    """What is imported stays, so a search for garbage need not look at it. With jax's trees, searches are a fifth."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


# What the run of a config imports, most of it later; scipy.io is imported by datasets.
IMPORTED = ("llm3.cli.run", "ml_collections.config_dict", "tensorboardX", "matplotlib.figure", "scipy.io")
PLUGINS = ("llm3.evals", "llm3.objectives", "llm3.data.formats", "llm3.data.windows")

if __name__ == "__main__":
    from llm3.distributed import allocator

    allocator.keep_freed_pages()
    for module in (*IMPORTED, *PLUGINS):
        importlib.import_module(module)
    for folder in PLUGINS:
        for plugin in pkgutil.iter_modules(sys.modules[folder].__path__, f"{folder}."):
            importlib.import_module(plugin.name)
    from tests.helpers import tiny_run

    seldom_collect_garbage()
    tiny_run.run(_serve())

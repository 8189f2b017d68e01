"""Programs that jax has compiled, kept in the workdir: stages, evaluations, restarts and other verbs find them again.

This is jax's persistent compilation cache, bounded in size. jax's own variables come first: where
JAX_COMPILATION_CACHE_DIR or JAX_ENABLE_COMPILATION_CACHE says otherwise, nothing is done here.
"""

import hashlib
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import jax
from jax.experimental.compilation_cache import compilation_cache

from llm3.distributed import processes
from llm3.files import COMPILED, PLAN

LIMIT = 2 * 2**30  # max bytes in the folder; jax removes what was not used for longest
LOCK, PROGRAM, USED = ".lockfile", "-cache", "-atime"  # jax's names: its lock, and the ends of the files of a program
LOCK_SECONDS = 10
# https://bford.info/cachedir: tar --exclude-caches, rsync filters and backups leave a folder with this file out
TAG, SIGNATURE = "CACHEDIR.TAG", "Signature: 8a477f597d28d172789f06886806bc55\n# programs that jax has compiled\n"


class Programs(NamedTuple):
    """Programs of this process: compiled here, and read from a cache; both 0 if jax has it disabled."""

    compiled: int = 0
    cached: int = 0


_counts = {"/jax/compilation_cache/compile_requests_use_cache": 0, "/jax/compilation_cache/cache_hits": 0}


def _count(event: str, **_: Any) -> None:
    if event in _counts:
        _counts[event] += 1


jax.monitoring.register_event_listener(_count)


def programs() -> Programs:
    """What was compiled and what was found, since this module was imported."""
    asked, found = _counts.values()
    return Programs(asked - found, found)


@contextmanager
def kept_in(workdir: Path) -> Iterator[None]:
    """Keep what is compiled in this context in the workdir, and use what is there; call it once devices are joined.

    In a workdir that cannot be written, programs are only read. jax creates the folder with the first program.
    """
    settings = _settings(workdir)
    if not settings:
        yield
        return
    directory = Path(settings["jax_compilation_cache_dir"])
    before = {name: _jax(name) for name in settings}
    _use(settings)
    try:
        _tidy(directory)
        yield
    finally:
        _use(before)
        _tidy(directory)


def folder(workdir: Path) -> Path:
    """The folder of a workdir's programs; stage runs of an ablation share that of the ablation.

    Programs for a CPU are machine code, which another kind of CPU may not know: each kind has a folder of its own.
    """
    ablation = workdir.resolve().parent.parent
    root = (ablation if (ablation / PLAN).is_file() else workdir) / COMPILED
    return root / f"cpu-{cpu_kind()}" if jax.default_backend() == "cpu" else root


def cpu_kind(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """A short digest of what this CPU can execute: its model and its instruction sets."""
    lines = {platform.machine(), platform.processor()}
    with suppress(OSError):
        described = ("model name", "flags", "Features", "CPU part")
        lines |= {line for line in cpuinfo.read_text(errors="replace").splitlines() if line.startswith(described)}
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:8]


def _settings(workdir: Path) -> dict[str, Any]:
    """The settings of jax for the programs of a workdir, {} if the user has chosen others, or there is no place."""
    if _jax("jax_compilation_cache_dir") or not _jax("jax_enable_compilation_cache"):
        return {}
    directory = folder(workdir)
    writable = _is_writable(directory)
    if not writable and not directory.is_dir():
        return {}
    # The first process writes, and locks the folder each time. The others, maybe hundreds, read without a lock.
    owns = writable and processes.is_first()
    chosen = {
        "jax_compilation_cache_max_size": LIMIT if owns else -1,
        "jax_persistent_cache_min_compile_time_secs": 0.0 if owns else float("inf"),
    }
    own = {name: value for name, value in chosen.items() if name.upper() not in os.environ}
    return own | {"jax_compilation_cache_dir": str(directory.absolute())}


def _is_writable(directory: Path) -> bool:
    """Whether a folder, or the nearest one above it that exists, can be written."""
    there = next(each for each in (directory, *directory.absolute().parents) if each.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _jax(name: str) -> Any:
    """A setting of jax, which its flags, variables or `jax.config.update` have set."""
    return getattr(jax.config, name)


def _use(settings: dict[str, Any]) -> None:
    compilation_cache.reset_cache()  # jax opens a cache once, and keeps it
    for name, value in settings.items():
        jax.config.update(name, value)


def _tidy(directory: Path) -> None:
    """Remove what a process left half written when it was killed: jax would write nothing more beside it."""
    if not directory.is_dir() or not processes.is_first():
        return
    with suppress(OSError, filelock.Timeout), filelock.FileLock(directory / LOCK, timeout=LOCK_SECONDS):
        if not (directory / TAG).exists():
            (directory / TAG).write_text(SIGNATURE)
        programs = {path.name.removesuffix(PROGRAM) for path in directory.glob(f"*{PROGRAM}")}
        used = {path.name.removesuffix(USED) for path in directory.glob(f"*{USED}") if path.stat().st_size == 8}
        for name in programs - used:
            (directory / f"{name}{PROGRAM}").unlink()
        for path in directory.glob(f"*{USED}"):
            if path.name.removesuffix(USED) not in programs & used:
                path.unlink()

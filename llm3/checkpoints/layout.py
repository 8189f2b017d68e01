"""How Orbax is used: its context, paths that it reads literally, and the files that a finished save must have."""

import glob
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint._src.futures.synchronization import OperationIdGenerator  # has no public name

from llm3.distributed import processes

# Orbax merges the files of each process into these; without them a part cannot be read.
OF_ARRAYS = ("manifest.ocdbt", "_METADATA")
OF_JSON = ("data.json",)
OF_STEP = "_CHECKPOINT_METADATA"
LEAST_SHARED_BYTES = 2**20  # a device writes its own part of a leaf that all devices have only if it is larger


class LiteralPath(type(epath.Path())):  # type: ignore[misc]  # the class of local paths
    """A local path whose `glob` matches the pattern only.

    Orbax finds the files of each process by a glob, which would read "[", "*" and "?" in the path as wildcards.
    """

    def glob(self, pattern: str) -> Iterator[Any]:
        """The files that match the pattern in this folder."""
        return (self / name for name in glob.glob(pattern, root_dir=str(self)))


def missing_files(step: Path, arrays: Iterable[str]) -> list[str]:
    """The files that a finished step lacks, or that are empty. arrays: the names of its parts that hold arrays."""
    parts = {part: OF_ARRAYS for part in arrays} | {"meta": OF_JSON}
    expected = [OF_STEP, *(f"{part}/{name}" for part, names in parts.items() for name in names)]
    return [name for name in expected if not ((step / name).is_file() and (step / name).stat().st_size)]


def align_operations() -> None:
    """Let all processes count the same number of Orbax operations, whatever each read: it names barriers by them."""
    own = int(OperationIdGenerator.get_current_operation_id())
    for _ in range(max(processes.exchange(own)) - own):
        OperationIdGenerator.next_operation_id()


def orbax_context(reads: bool = False) -> ocp.Context:
    """The options of all writes, and of reads: each process reads by itself.

    Orbax would let a process wait for minutes for another one that cannot read a file.
    """
    context = ocp.Context()
    if reads:
        context.multiprocessing_options.primary_host = jax.process_index()
        context.multiprocessing_options.active_processes = {jax.process_index()}
    context.async_options.create_directories_asynchronously = False  # else all processes wait for minutes if one fails
    # else Orbax compiles a slice for each small leaf on each device, so that the replicas share the writing of it
    context.array_options.saving.min_slice_bytes_for_replica_parallel = LEAST_SHARED_BYTES
    context.checkpointables.registry = ocp.handlers.local_registry().add(
        ocp.handlers.JsonHandler, checkpointable_name="meta"
    )
    return context

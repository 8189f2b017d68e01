"""How Orbax is used: its context, paths that it reads literally, and the files that a finished save must have."""

import glob
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint._src.futures.synchronization import OperationIdGenerator  # has no public name

from llm3.checkpoints import s3
from llm3.distributed import processes

# Orbax merges the files of each process into these; without them a part cannot be read.
OF_ARRAYS = ("manifest.ocdbt", "_METADATA")
OF_JSON = ("data.json",)
OF_STEP = "_CHECKPOINT_METADATA"
FEW_BYTES = 2**28  # with fewer in a process, a save is one transaction, held in memory until it is written
MOST_CHUNK_BYTES = 2**26  # a process that needs a part of a chunk reads and holds all of it
LEAST_SHARED_BYTES = 2**20  # a device writes its own part of a leaf that all devices have only if it is larger


class LiteralPath(type(epath.Path())):  # type: ignore[misc]  # the class of local paths
    """A local path whose `glob` matches the pattern only.

    Orbax finds the files of each process by a glob, which would read "[", "*" and "?" in the path as wildcards.
    """

    def glob(self, pattern: str) -> Iterator[Any]:
        """The files that match the pattern in this folder."""
        return (self / name for name in glob.glob(pattern, root_dir=str(self)))


def for_orbax(path: Path) -> Any:
    """A path as it is passed to Orbax."""
    if str(path).startswith(s3.SCHEME):
        s3.let_orbax_write_there()
    return LiteralPath(path) if isinstance(path, Path) else path


def missing_files(step: Path, arrays: Iterable[str]) -> list[str]:
    """The files that a finished step lacks, or that are empty. arrays: the names of its parts that hold arrays."""
    parts = {part: OF_ARRAYS for part in arrays} | {"meta": OF_JSON}
    expected = [OF_STEP, *(f"{part}/{name}" for part, names in parts.items() for name in names)]
    return [name for name in expected if not ((step / name).is_file() and _size(step / name))]


def _size(file: Any) -> int:
    return file.stat().st_size if isinstance(file, Path) else file.stat().length


def align_operations() -> None:
    """Let all processes count the same number of Orbax operations, whatever each read: it names barriers by them."""
    own = int(OperationIdGenerator.get_current_operation_id())
    for _ in range(max(processes.exchange(own)) - own):
        OperationIdGenerator.next_operation_id()


def orbax_context(concurrent_bytes: int | None = None, by_file: bool = False) -> ocp.Context:
    """The options of all reads and writes. concurrent_bytes: of one process, compressed at once; None: any number.

    by_file: write into the final folder, as `commit.py` says.
    """
    context = ocp.Context()
    context.memory.write_concurrent_bytes = concurrent_bytes
    context.array_options.saving.storage_options.chunk_byte_size = MOST_CHUNK_BYTES
    if by_file:
        context.atomicity.mode = ocp.options.AtomicityMode.COMMIT_FILE
    context.async_options.create_directories_asynchronously = False  # else all processes wait for minutes if one fails
    # else Orbax compiles a slice for each small leaf on each device, so that the replicas share the writing of it
    context.array_options.saving.min_slice_bytes_for_replica_parallel = LEAST_SHARED_BYTES
    context.checkpointables.registry = ocp.handlers.local_registry().add(
        ocp.handlers.JsonHandler, checkpointable_name="meta"
    )
    return context


def concurrent_bytes(parts: Iterable[Mapping[str, Any]]) -> int | None:
    """How many bytes a process may compress at once, so that it needs a tenth of its shards for them; None: all.

    A shard is compressed at once. parts: {path: array}, each of which Orbax limits by itself. The same on all
    processes, which open a writer with this limit together.
    """
    written, largest = 0, 0
    for leaf in (leaf for part in parts for leaf in part.values()):
        shards = leaf.addressable_shards if isinstance(leaf, jax.Array) else []
        written += sum(shard.data.nbytes for shard in shards if shard.replica_id == 0) if shards else leaf.nbytes
        largest = max([largest, *(shard.data.nbytes for shard in shards)] if shards else [largest, leaf.nbytes])
    written, largest = (max(each) for each in zip(*processes.exchange([written, largest]), strict=True))
    return max(written // 25, largest + 1) if written > FEW_BYTES else None  # Orbax refuses a shard above the limit


def reading_context() -> ocp.Context:
    """The options of reads, of the leaves of a target alone: each process reads by itself.

    Orbax would let a process wait for minutes for another one that cannot read a file.
    """
    context = orbax_context()
    context.pytree.loading.partial_load = True
    context.multiprocessing.primary_host = jax.process_index()
    context.multiprocessing.active_processes = {jax.process_index()}
    return context

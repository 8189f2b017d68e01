"""The verb `bench-model`: read a pretrained model onto the devices and write it again, and sample the host's memory."""

import contextlib
import functools
import json
import math
import shutil
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm3.config.model_schema import ModelConfig
from llm3.distributed.host_memory import anonymous_bytes, peak_of
from llm3.distributed.sharding import make_mesh
from llm3.interop.folder import Folder, open_folder
from llm3.interop.write import write_folder
from llm3.models.transformer import abstract, abstract_params
from llm3.segments import canonical
from llm3.tree import flatten, unflatten

FILES = 4  # that a generated model has at least
STEP = 128  # of the width of a generated model
_sampled = functools.partial(peak_of, seconds=0.01)


def bench_model(workdir: Path, **options: Any) -> int:
    """Print the metrics of `measure_model` as JSON."""
    print(json.dumps(measure_model(workdir, **options), indent=1))
    return 0


def measure_model(
    workdir: Path, model: str | None = None, gigabytes: float = 2, fsdp: int = 1, dtype: str = "float32"
) -> dict[str, Any]:
    """Read a model, or one generated inside `workdir`, write it inside `workdir`, remove that, and return the metrics.

    model: a folder or a name on the Hub. fsdp: the number of devices that share each leaf. dtype: of the arrays, and of
    the files written. array_bytes: on all devices. largest_part_bytes: the largest part of a leaf on one device.
    read_peak_bytes, write_peak_bytes: anonymous memory of this process above that before; None without /proc.
    read_peak_above_arrays_bytes: the same without the arrays, which lie in it on a CPU; malloc may keep some freed MB.
    read_allocated_bytes: the peak of what Python and numpy allocate. read_peak_ratio: the larger of these two to the
    largest part. Raises UserError for a model that cannot be read, and for a mesh that does not fit.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(dir=workdir, prefix="model-bench."))
    try:
        if model is None:
            model = str(generate(directory / "generated", int(gigabytes * 1e9)))
        folder = open_folder(model, None, "--model")
        mesh = make_mesh({"fsdp": fsdp}, jax.devices()[:fsdp])
        wanted = {
            path: jax.ShapeDtypeStruct(like.shape, jnp.dtype(dtype), sharding=like.sharding)
            for path, like in flatten(abstract_params(folder.model, mesh)).items()
            if path in folder.leaves
        }
        folder.read(*min(wanted.items(), key=lambda each: math.prod(each[1].shape)))  # sets up the devices
        leaves, metrics = _read(folder, wanted)
        about = {"family": folder.family, "devices": fsdp, "dtype": dtype, "file_bytes": _file_bytes(folder.path)}
        return about | metrics | _written(folder, leaves, directory / "written", dtype)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def generate(directory: Path, size: int) -> Path:
    """Write a model with the layout of Llama in bfloat16, of about `size` bytes (at least 1.5 MB), in several files.

    All rows of a leaf are equal, so that the host holds one file at a time.
    """
    count = size / 2
    width = max(round((8 * count) ** (1 / 3) / STEP), 1) * STEP
    outside, layer = 32 * width**2, 15 * width**2  # parameters, without those of norms
    layers, heads = max(round((count - outside) / layer), 1), width // 64
    model = ModelConfig(
        layers, width, heads, 4 * width, kv_heads=heads // 2, vocab_size=16 * width, tie_embeddings=False
    )
    random = np.random.default_rng(0)
    shapes = {path: like.shape for path, like in flatten(canonical(abstract(model).shapes)).items()}
    leaves = {
        path: np.broadcast_to(random.standard_normal(each[-1], np.float32), each) for path, each in shapes.items()
    }
    directory.mkdir()
    limit = f"{max(size // FILES // 1000, 1)}KB"
    write_folder(directory, unflatten(leaves), model, family="llama", dtype="bfloat16", max_shard_size=limit)
    return directory


def _read(folder: Folder, wanted: dict[str, jax.ShapeDtypeStruct]) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """The leaves, and the metrics of reading them."""
    leaves, held, on_cpu = {}, 0, jax.default_backend() == "cpu"
    part_bytes = lambda like: math.prod(like.sharding.shard_shape(like.shape)) * like.dtype.itemsize  # noqa: E731
    largest = max(map(part_bytes, wanted.values()))

    def without_arrays() -> int | None:
        now = anonymous_bytes()
        return None if now is None else now - held * on_cpu

    before = time.perf_counter()
    with _sampled(anonymous_bytes) as memory, _sampled(without_arrays) as rest, _allocated() as allocated:
        for path, like in wanted.items():
            held += part_bytes(like) * len(like.sharding.addressable_devices)
            leaves[path] = folder.read(path, like)
    return leaves, {
        "read_seconds": time.perf_counter() - before,
        "array_bytes": held,
        "largest_part_bytes": largest,
        "anonymous_before_bytes": memory.before,
        "read_peak_bytes": memory.grown,
        "read_peak_above_arrays_bytes": rest.grown,
        "read_allocated_bytes": allocated[0],
        "read_peak_ratio": max(rest.grown or 0, allocated[0]) / largest,
    }


def _written(folder: Folder, leaves: dict[str, jax.Array], to: Path, dtype: str) -> dict[str, Any]:
    """Write the leaves into a new directory; returns the metrics of that."""
    to.mkdir()
    write = functools.partial(write_folder, family=folder.family, max_length=folder.max_length, labels=folder.labels)
    before = time.perf_counter()
    with _sampled(anonymous_bytes) as memory:
        write(to, unflatten(leaves), folder.model, dtype=dtype)
    return {
        "written_bytes": _file_bytes(to),
        "write_seconds": time.perf_counter() - before,
        "write_peak_bytes": memory.grown,  # on top of the arrays
    }


@contextlib.contextmanager
def _allocated() -> Iterator[list[int]]:
    """Yield [0], which becomes the peak bytes of what Python and numpy, but not jax, allocate in the context."""
    peak = [0]
    tracemalloc.start()
    try:
        yield peak
        peak[0] = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def _file_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))

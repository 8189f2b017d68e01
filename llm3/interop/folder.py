"""Reading a model of others: its config and the headers of its files at once, its leaves slice by slice."""

import dataclasses
import functools
import gc
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np

from llm3.config.model_schema import ModelConfig
from llm3.errors import UserError
from llm3.interop.family import family_of_json, load_family
from llm3.interop.hub import TEXT_FILES, fetch_weights, find_folder
from llm3.interop.names import Names, match_names
from llm3.interop.shards import DTYPES, INDEX, Shards, read_object
from llm3.interop.table import Place, layered

VOCAB_AXIS = {"embed/embedding": 0, "lm_head/kernel": 1, "lm_head/bias": 0}  # of leaves that may be padded
BLOCK = 2**18  # elements that are read at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Folder:
    """A model of others. Nothing but headers is read before `read` and `digest` are asked for."""

    path: Path
    name: str  # the path or name that was asked for
    revision: str | None  # the commit of a model from the Hub
    family: str
    config: dict[str, Any]  # fields of a ModelConfig
    max_length: int | None  # the longest window of its training, if the files say so
    leaves: dict[str, tuple[tuple[int, ...], str]]  # {canonical path: (shape, dtype)}
    labels: tuple[str, ...]  # of its task head; () without one
    ignored: tuple[str, ...]  # tensors in the files that no leaf needs
    places: Mapping[str, Place] = dataclasses.field(repr=False)
    names: Names = dataclasses.field(repr=False)
    shards: Shards = dataclasses.field(repr=False)

    @property
    def model(self) -> ModelConfig:
        """The config of the model in the files, with its task head if it has one."""
        return ModelConfig(**self.config, classes=len(self.labels))

    @functools.cached_property
    def digest(self) -> str:
        """The sha256 over the names and contents of the files that are read, the tokenizer's among them."""
        names = sorted({*TEXT_FILES, INDEX, *self.shards.names})
        digest = hashlib.sha256()
        for name in names:
            if (path := self.path / name).is_file():
                stat = path.stat()
                digest.update(f"{name} {_file_digest(path, stat.st_size, stat.st_mtime_ns)}\n".encode())
        return digest.hexdigest()

    def read(self, path: str, like: jax.ShapeDtypeStruct) -> jax.Array:
        """A leaf in the shape, dtype and sharding of `like`. Each part is read by itself, once for all its copies.

        Rows of the vocabulary beyond those of the files are zeros. Raises UserError for a leaf that the files lack, or
        that has another shape there.
        """
        if path not in self.leaves:
            raise UserError(f"{self.name} has no {path}")
        shape, axis = self.leaves[path][0], VOCAB_AXIS.get(path)
        trimmed = tuple(min(a, b) if i == axis else b for i, (a, b) in enumerate(zip(shape, like.shape, strict=False)))
        if len(shape) != len(like.shape) or trimmed != shape:
            raise UserError(f"{self.name}: {path} is {list(shape)}; expected {list(like.shape)}")
        sharding = like.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        copies: dict[tuple[range, ...], list[jax.Device]] = {}  # devices that hold the same part
        for device, index in sharding.addressable_devices_indices_map(like.shape).items():
            ranges = tuple(range(*each.indices(size)) for each, size in zip(index or (), like.shape, strict=True))
            copies.setdefault(ranges, []).append(device)
        parts = []
        for ranges, devices in copies.items():  # one after the other, so that the host holds one part at a time
            parts += jax.block_until_ready(
                jax.device_put([self._piece(path, ranges, like.dtype)] * len(devices), devices)
            )
            gc.collect(0)  # jax holds a numpy array that it has copied until the next collection
        return jax.make_array_from_single_device_arrays(like.shape, sharding, parts)

    def _piece(self, path: str, ranges: tuple[range, ...], dtype: Any) -> np.ndarray:
        """A part of a leaf as a numpy array of this dtype."""
        shape = [len(each) for each in ranges]
        piece = np.zeros(math.prod(shape) + 1, dtype)[1:].reshape(shape)  # not aligned: on a CPU, jax copies it too
        known = tuple(
            range(each.start, min(each.stop, size)) for each, size in zip(ranges, self.leaves[path][0], strict=True)
        )
        inside = piece[tuple(slice(len(each)) for each in known)]
        if not inside.size:
            return piece
        if not layered(path):
            self._fill(inside, path, 0, known)
        for row, layer in enumerate(known[0] if layered(path) else ()):
            self._fill(inside[row, ...], path, layer, known[1:])
        return piece

    def _fill(self, piece: np.ndarray, path: str, layer: int, ranges: tuple[range, ...]) -> None:
        """Put a part of one layer of a leaf into `piece`, some rows of its tensor at a time."""
        place = self.places[path]
        if (tensor := self.names.found.get(place.named(layer))) is None:  # ModernBERT's first norm, or a head's bias
            piece[...] = float(path.endswith("/scale"))
            return
        axis = place.view.order[0]  # the leaf's axis along the rows
        count = len(ranges[axis])
        step = max(1, BLOCK * count // piece.size)
        for start in range(0, count, step):
            index = (slice(None),) * axis + (slice(start, start + step),)
            rows = tuple(each[start : start + step] if i == axis else each for i, each in enumerate(ranges))
            piece[index] = place.view.read(self.shards.slices(tensor), rows)


def open_folder(path_or_name: str, revision: str | None, where: str) -> Folder:
    """The model in a folder, or of this name on the Hugging Face Hub.

    revision: a branch, tag or commit of the Hub. where: the field or flag that names the model, for messages. Raises
    UserError for a model that cannot be read as it is, without reading or guessing any part of it: pickle, files that
    are missing or damaged, a family or an option that llm3 does not compute, leaves too many, too few or of another
    shape.
    """
    try:
        path, commit = find_folder(path_or_name, revision)
        described = read_object(path / "config.json")
        family = family_of_json(described)
        plugin = load_family(family)
        fields = _fields(plugin, described)
        fetch_weights(path_or_name, path, commit)
        return _opened(path, path_or_name, commit, family, plugin, fields, described)
    except UserError as error:
        raise UserError(f"{where}={path_or_name!r}: {error}") from error


def _fields(plugin: ModuleType, described: dict) -> dict[str, Any]:
    """The fields of a ModelConfig that a config.json means. Raises UserError, also for values of a wrong type."""
    try:
        fields = plugin.read_config(described)
        ModelConfig(**fields)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"config.json has a value that cannot be: {type(error).__name__}: {error}") from error
    return fields


def _opened(
    path: Path, name: str, revision: str | None, family: str, plugin: ModuleType, fields: dict, described: dict
) -> Folder:
    shards = Shards(path)
    labels = labels_of(described) if "head" in plugin.TABLE else ()
    model = ModelConfig(**fields)
    names, places = match_names(shards, plugin, model, len(labels))
    fields = fields | {"pooler": "pooler/kernel" in places}
    leaves = {}
    for leaf, place in places.items():
        shape = (model.layers, *place.view.shape) if layered(leaf) else place.view.shape
        tensor = names.found.get(place.named(model.layers - 1))
        leaves[leaf] = shape, DTYPES[shards.tensors[tensor][1]] if tensor else "float32"
    longest = fields.get("max_positions") or described.get("max_position_embeddings")
    return Folder(path, name, revision, family, fields, longest, leaves, labels, names.ignored, places, names, shards)


def labels_of(described: Mapping[str, Any]) -> tuple[str, ...]:
    """The labels in a config.json of a classifier of sequences, in the order of their ids; () of another model."""
    architectures = described.get("architectures") or [""]
    if not architectures[0].endswith("ForSequenceClassification"):
        return ()
    found = described.get("id2label") or {0: "LABEL_0", 1: "LABEL_1"}  # transformers' default
    return tuple(str(found[key]) for key in sorted(found, key=int))


@functools.lru_cache(maxsize=1024)
def _file_digest(path: Path, size: int, modified: int) -> str:
    """The sha256 of a file; size and modified: so that a changed file is read again."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Writing a model in the layout of its family: config.json, and safetensors files of a limited size."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.numpy import save_file

from llm3 import __version__
from llm3.config.model_schema import ModelConfig
from llm3.errors import UserError
from llm3.files import write_json
from llm3.interop.family import family_of_model, load_family
from llm3.interop.folder import VOCAB_AXIS
from llm3.interop.names import model_places, tensors_of
from llm3.interop.shards import INDEX
from llm3.interop.table import Place, layered
from llm3.tree import flatten

MAX_SHARD_SIZE = "5GB"
LM_HEAD, TASK_HEAD = ("lm_transform/", "lm_head/"), ("head/", "pooler/")
Piece = tuple[str, int, Place]  # canonical path, layer, place: a leaf of a layer inside a tensor


class Written(NamedTuple):
    """What was written, in words; bias: the file with a `score.bias`, "" if there is none."""

    title: str
    summary: str
    bias: str


def write_folder(
    directory: Path,
    params: dict,
    model: ModelConfig,
    *,
    family: str | None = None,
    max_length: int | None = None,
    labels: tuple[str, ...] = (),
    several_labels: bool = False,
    more: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    max_shard_size: str = MAX_SHARD_SIZE,
) -> list[str]:
    """Write config.json and the weights of a model into a directory; returns lines of a summary.

    params: canonical; adapters in it are left out. family: the family that the model came from; None: the first that
    can express it. max_length: the longest window, for models with rotary positions. labels: those of the task head,
    which goes to its family's own place, and the LM head is left out; (): the task head is left out. several_labels: a
    sequence can have more than one. more: further keys of config.json, such as token ids. Raises UserError for what the
    family cannot express, before anything is written.
    """
    family = family_of_model(model, family)
    plugin = load_family(family)
    flat = {path: leaf for path, leaf in flatten(params).items() if "/lora/" not in path}
    if not labels:
        model = dataclasses.replace(model, classes=0, pooler=False)
    others = LM_HEAD if labels else TASK_HEAD  # transformers' class has no place for them
    left_out = sorted({path.partition("/")[0] for path in flat if path.startswith(others)})
    flat = {path: leaf for path, leaf in flat.items() if not path.startswith(others)}
    described = config_json(plugin, model, max_length, labels, several_labels) | {"dtype": dtype}
    written = write_weights(directory, flat, model_places(plugin, model), model, dtype, max_shard_size)
    write_json(directory / "config.json", {**(more or {}), **described})
    architecture, tied = described["architectures"][0], ", tied lm_head" * model.tie_embeddings
    lines = [f"{written.title}: {architecture}, {written.summary}{tied}"]
    if labels and left_out:
        lines.append(f"{' and '.join(left_out)}: left out, {architecture} has no LM head")
    if written.bias:
        lines.append(_about_bias(np.asarray(flat["head/bias"]), written.bias))
    return lines


def config_json(
    plugin: ModuleType, model: ModelConfig, max_length: int | None, labels: tuple[str, ...], several_labels: bool
) -> dict[str, Any]:
    """The config.json of a model. With labels, transformers' class is the one with a head for them."""
    described = {
        "architectures": [plugin.CLASSIFIER if labels else plugin.LM],
        "model_type": plugin.MODEL_TYPES[0],
        **({"max_position_embeddings": max_length} if max_length and model.positions == "rope" else {}),
        **plugin.write_config(model),
    }
    if labels:
        described["id2label"] = {str(i): label for i, label in enumerate(labels)}
        described["label2id"] = {label: i for i, label in enumerate(labels)}
        if several_labels:
            described["problem_type"] = "multi_label_classification"
    return described


def write_weights(
    directory: Path, flat: Mapping[str, Any], places: dict[str, Place], model: ModelConfig, dtype: str, limit: str
) -> Written:
    """Write the leaves to model.safetensors, or to several files of at most `limit` bytes and an index."""
    tensors: dict[str, list[Piece]] = {}
    for path in flat:
        for layer, name in tensors_of(path, places[path], model):
            tensors.setdefault(name, []).append((path, layer, places[path]))
    if "score.bias" in tensors and not np.asarray(flat["head/bias"]).any():  # transformers' classes have none
        del tensors["score.bias"]
    shapes = {name: pieces[0][2].view.tensor_shape for name, pieces in tensors.items()}
    shapes = {name: _trimmed(shape, tensors[name][0][0], model) for name, shape in shapes.items()}
    count = sum(int(np.prod(shape)) for shape in shapes.values())
    size = jnp.dtype(dtype).itemsize
    split = split_state_dict_into_shards_factory(
        {name: int(np.prod(shape)) * size for name, shape in shapes.items()},
        get_storage_size=int,
        get_storage_id=lambda _: None,
        max_shard_size=limit,
        filename_pattern="model{suffix}.safetensors",
    )
    for file, names in split.filename_to_tensors.items():
        made = {name: _tensor(tensors[name], shapes[name], flat, model, dtype) for name in names}
        save_file(made, directory / file, metadata={"format": "pt", "llm3": __version__})
    if split.is_sharded:
        write_json(directory / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
    files = list(split.filename_to_tensors)
    title = files[0] if len(files) == 1 else f"{len(files)} files model-*.safetensors"
    summary = f"{len(tensors)} tensors, {count:,} parameters, {size * count:,} bytes, {dtype}"
    return Written(title, summary, split.tensor_to_filename.get("score.bias", ""))


def _trimmed(shape: tuple[int, ...], path: str, model: ModelConfig) -> tuple[int, ...]:
    """The shape of a tensor without the rows that only pad the vocabulary."""
    if path in VOCAB_AXIS:  # [V, ...] in the files of every family
        return (model.vocab_size, *shape[1:])
    return shape


def _tensor(
    pieces: list[Piece], shape: tuple[int, ...], flat: Mapping[str, Any], model: ModelConfig, dtype: str
) -> Any:
    """A tensor put together from its leaves, in `dtype`. Raises UserError for values that float16 cannot hold."""
    path, _, place = pieces[0]
    whole = np.empty(place.view.tensor_shape, np.float32)
    for path, layer, place in pieces:
        leaf = flat[path][layer] if layered(path) else flat[path]
        place.view.write(whole, np.asarray(leaf, np.float32))
    trimmed = whole[: shape[0]] if shape != whole.shape else whole
    with np.errstate(over="ignore"):
        made = trimmed.astype(jnp.dtype(dtype))
    if dtype == "float16" and np.isinf(made).any():
        raise UserError(f"--dtype=float16: {path} has values up to {np.abs(trimmed).max():.3g}, beyond float16's 65504")
    return np.ascontiguousarray(made)


def _about_bias(bias: np.ndarray, file: str) -> str:
    return (
        f"score.bias: up to {np.abs(bias).max():.3g}, which transformers leaves out; to add it, set model.score.bias = "
        f"torch.nn.Parameter(safetensors.torch.load_file({file!r})['score.bias']). A stage with "
        "train=['not head/bias', ...] has none"
    )

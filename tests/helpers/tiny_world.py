"""What tests do with a folder of somebody else's model: read it whole, and compute with it."""

from pathlib import Path

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from llm3.config.model_schema import ModelConfig
from llm3.interop.folder import Folder
from llm3.interop.write import write_folder
from llm3.models.transformer import abstract
from llm3.segments import canonical, segmented
from llm3.tree import flatten, unflatten
from tests.helpers.tiny import jit


def read_params(folder: Folder, dtype=np.float32) -> dict:
    """All leaves of a folder as canonical parameters on one device."""
    like = {path: jax.ShapeDtypeStruct(shape, dtype) for path, (shape, _) in folder.leaves.items()}
    return unflatten({path: folder.read(path, each) for path, each in like.items()})


def completed(model: ModelConfig, params: dict) -> dict:
    """The parameters as numpy arrays, with zeros for the leaves of heads that the files lack."""
    shapes = flatten(canonical(abstract(model).shapes))
    zeros = {path: np.zeros(leaf.shape, np.float32) for path, leaf in shapes.items()}
    return unflatten(zeros | flatten(jax.device_get(params)))


def float32_model(folder: Folder, **changes) -> ModelConfig:
    """The config of a folder's model, computed in float32."""
    return ModelConfig(**folder.config | {"classes": len(folder.labels), "compute_dtype": "float32"} | changes)


def packed(*documents: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, positions and segments [1, length] of documents end to end, then padding."""
    tokens, positions, segments = (np.zeros((1, length), np.int32) for _ in range(3))
    start = 0
    for segment, document in enumerate(documents, start=1):
        place = (0, slice(start, start + len(document)))
        tokens[place], positions[place], segments[place] = document, np.arange(len(document)), segment
        start += len(document)
    return tokens, positions, segments


def packed_logits(model: ModelConfig, params: dict, *documents: np.ndarray, length: int) -> list[np.ndarray]:
    """llm3's logits [T, V] of each document, computed in one packed window with padding at its end."""

    @jit
    def run(params, *batch):
        built = nnx.merge(abstract(model).graph, params)
        return built.logits(built(*batch))

    found = np.asarray(run(segmented(params, ((0, model.layers),)), *packed(*documents, length=length)))[0]
    return np.split(found, np.cumsum([len(each) for each in documents]))[:-1]


def class_logits(model: ModelConfig, params: dict, text: np.ndarray) -> np.ndarray:
    """llm3's class logits of the second document of a window, [C]."""

    @jit
    def run(params, tokens, positions, segments):
        built = nnx.merge(abstract(model).graph, params)
        return built.class_logits(built(tokens, positions, segments), segments)

    batch = packed(text[:5], text, length=len(text) + 8)
    found = np.asarray(run(segmented(params, ((0, model.layers),)), *batch))[0]
    return found[5 + (0 if model.pool == "first" else len(text) - 1)]


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors in the safetensors files of a folder."""
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def write_again(folder: Folder, to: Path, dtype: str = "float32", **options) -> Path:
    """Write the model of a folder into the new folder `to`."""
    to.mkdir()
    options = {"family": folder.family, "max_length": folder.max_length, "labels": folder.labels} | options
    more = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    write_folder(to, read_params(folder), float32_model(folder), more=more, dtype=dtype, **options)
    return to

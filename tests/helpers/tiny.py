"""Models of a few thousand parameters, none of them at its initial value, and batches to feed them."""

import jax
import numpy as np

from llm3.config.schema import ModelConfig
from llm3.data.batch import Batch
from llm3.models.transformer import abstract
from llm3.objectives import Task
from llm3.segments import canonical
from llm3.tree import map_with_path

VOCAB, CLASSES, LENGTH = 61, 5, 16
TASK = Task(options=None, tokenizer=None, length=LENGTH)  # of objectives that ask for nothing
COMPILE_FAST = {"xla_backend_optimization_level": 0}  # these programs run once: compiling is what costs


def jit(function, **options):
    return jax.jit(function, compiler_options=COMPILE_FAST, **options)


def model_config(**changes) -> ModelConfig:
    fields = {"layers": 3, "d_model": 16, "heads": 4, "kv_heads": 2, "head_dim": 6, "d_ff": 28}
    return ModelConfig(**fields | {"vocab_size": VOCAB, "compute_dtype": "float32"} | changes)


def make_params(config: ModelConfig, seed: int = 0) -> dict:
    """Canonical float32 numpy arrays: kernels that keep the variance, and scales, biases away from 1 and 0."""
    random = np.random.default_rng(seed)

    def leaf(path: str, shape) -> np.ndarray:
        name = path.split("/")[-1]
        noise = random.standard_normal(shape.shape)
        if name == "kernel":
            inputs = np.prod(shape.shape[1:-1] if path.endswith("out/kernel") else shape.shape[path[:6] == "layers"])
            noise /= np.sqrt(inputs)
        elif name == "scale":
            noise = (0 if config.norm_unit_offset else 1) + 0.2 * noise
        elif name == "bias":
            noise *= 0.2
        return noise.astype(np.float32)

    return map_with_path(leaf, canonical(abstract(config).shapes))


def make_row(*documents: np.ndarray, length: int = LENGTH) -> Batch:
    """Documents end to end in one window [length], then padding. Each token but a document's first is a target."""
    row = Batch(*(np.zeros(length, np.float32 if name == "weights" else np.int32) for name in Batch._fields))
    start = 0
    for segment, document in enumerate(documents, start=1):
        place = slice(start, start + len(document))
        row.tokens[place], row.positions[place], row.segments[place] = document, np.arange(len(document)), segment
        row.targets[start : place.stop - 1], row.weights[start : place.stop - 1] = document[1:], 1
        start = place.stop
    return row


def stack(*rows: Batch) -> Batch:
    return Batch(*(np.stack(each) for each in zip(*rows, strict=True)))


def make_documents(count: int, seed: int = 0, least: int = 3, most: int = 8) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(0, VOCAB, random.integers(least, most + 1)) for _ in range(count)]


def make_batch(rows: int, seed: int = 0) -> Batch:
    """Two documents and some padding a row, with uneven numbers of targets: row 1 has none, row 2 has one."""
    documents = make_documents(2 * rows, seed)
    batch = stack(*(make_row(*documents[i : i + 2]) for i in range(0, 2 * rows, 2)))
    batch.weights[1:3] = 0
    batch.weights[2:3, 1] = 1
    return batch


def make_labelled(rows: int, seed: int = 0) -> Batch:
    """The same documents, each with a class as the target of its last token."""
    batch = make_batch(rows, seed)
    following = np.pad(batch.segments[:, 1:], ((0, 0), (0, 1)))
    last = (batch.segments > 0) & (batch.segments != following)
    classes = np.random.default_rng(seed).integers(0, CLASSES, batch.tokens.shape)
    return batch._replace(targets=np.where(last, classes, 0).astype(np.int32), weights=last.astype(np.float32))

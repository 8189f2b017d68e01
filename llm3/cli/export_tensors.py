"""Tensors of an export: contiguous arrays, and the writer of safetensors files."""

from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from llm3.errors import UserError
from llm3.tree import size

Save = Callable[[Path, dict[str, np.ndarray], dict[str, str]], str]  # of a `safetensors_writer`


def safetensors_writer(dtype: str) -> Save:
    """A function that writes tensors in `dtype`, and metadata, to a file, and returns their count and size in words.

    Raises UserError without the library safetensors.
    """
    try:
        from safetensors.numpy import save_file
    except ImportError as error:
        raise UserError("export needs the library safetensors: pip install 'llm3[hf]'") from error

    def save(path: Path, tensors: dict[str, np.ndarray], about: dict[str, str]) -> str:
        save_file({name: each.astype(jnp.dtype(dtype)) for name, each in tensors.items()}, path, metadata=about)
        count = size(tensors)
        return f"{len(tensors)} tensors, {count:,} parameters, {jnp.dtype(dtype).itemsize * count:,} bytes, {dtype}"

    return save


def contiguous(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, np.float32)

"""The safetensors files of a folder: one, or several with an index. Only slices of tensors are ever read.

Everything in a folder comes from outside: names of files in the index are checked, and pickle is never read.
"""

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from llm3.errors import UserError, listed

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
Slice = Callable[[tuple[slice, ...]], np.ndarray]


class Shards:
    """The tensors of a folder by name, without their contents: shapes and dtypes. Files stay open, mapped into memory.

    Raises UserError for pickle, for a file that is missing or not complete, and for an index that does not fit.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.names = weight_files(folder)  # of the files
        self._open = {name: _opened(folder / name) for name in self.names}
        self._file = {tensor: name for name, each in self._open.items() for tensor in each.keys()}  # noqa: SIM118
        self._check_index()

    def _check_index(self) -> None:
        index = read_index(self.folder)
        if index is None:
            return
        if lost := [tensor for tensor, name in index.items() if self._file.get(tensor) != name]:
            raise UserError(f"{self.folder / INDEX} names tensors that are not in their file: {listed(lost)}")
        if extra := [tensor for tensor in self._file if tensor not in index]:
            raise UserError(f"{self.folder / INDEX} does not name tensors that its files hold: {listed(extra)}")

    @functools.cached_property
    def tensors(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """{name: (shape, dtype of safetensors)}."""
        found = {}
        for tensor, name in self._file.items():
            each = self._open[name].get_slice(tensor)
            found[tensor] = tuple(each.get_shape()), each.get_dtype()
        return found

    def slices(self, tensor: str) -> Slice:
        """A function that reads a slice of a tensor."""
        each = self._open[self._file[tensor]].get_slice(tensor)
        return lambda index: each[index]


def weight_files(folder: Path) -> list[str]:
    """The names of the safetensors files of a folder. Raises UserError if there are none, or not all."""
    index = read_index(folder)
    if index is not None:
        names = sorted(set(index.values()))
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise UserError(f"{folder}: {len(missing)} of {len(names)} files are missing: {listed(missing)}")
        return names
    if (folder / SINGLE).is_file():
        return [SINGLE]
    found = sorted(path.name for path in folder.iterdir() if path.is_file())
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} holds a PEFT adapter, not a model; merge it into its base with peft first")
    if pickled := [name for name in found if name.endswith(PICKLED)]:
        raise UserError(
            f"{folder} holds {listed(pickled)} but no {SINGLE}: llm3 does not read pickle, which can run code. Where "
            'you trust it, convert: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder}').save_pretrained('NEW')\""
        )
    others = [name for name in found if name.endswith(".safetensors")]
    hint = f"; found {listed(others)}" if others else ""
    raise UserError(f"{folder} has neither {SINGLE} nor {INDEX}{hint}")


def read_index(folder: Path) -> dict[str, str] | None:
    """{tensor: file} of the index; None without one. Raises UserError if it is damaged or leaves the folder."""
    if not (path := folder / INDEX).is_file():
        return None
    index = read_object(path).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise UserError(f"{path} has no weight_map of names")
    for name in set(index.values()):
        if "/" in name or "\\" in name or ".." in name or not name.endswith(".safetensors"):
            raise UserError(
                f"{path} names a file {name!r}: expected the name of a .safetensors file in the same folder"
            )
    return index


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a folder. Raises UserError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected an object, got {type(value).__name__}")
    return value


def _opened(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            if file.read(32).startswith(b"version https://git-lfs"):
                raise UserError(f"{path} is a pointer of git-lfs, not the file itself: run git lfs pull")
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a complete safetensors file ({error}); get it again") from error


def check_dtypes(tensors: Mapping[str, tuple[tuple[int, ...], str]], folder: Path) -> None:
    """Raise UserError unless all tensors are of dtypes that can be read."""
    others = {dtype for _, dtype in tensors.values() if dtype not in DTYPES}
    if others:
        names = [name for name, (_, dtype) in tensors.items() if dtype in others]
        raise UserError(
            f"{folder}: tensors of dtype {', '.join(sorted(others))}: {listed(names)}; expected {', '.join(DTYPES)}"
        )

"""The results of an evaluation item by item, as columns of a parquet file beside the row of the stage.

The file is `STAGE/predictions/<evaluation>.parquet`, in which items stand in the order of the column `item`, the row of
the document in its source: the key by which two stages, or two runs, are paired. docs/evaluation.md lists the columns.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llm3.errors import UserError, writing
from llm3.files import PREDICTIONS, write_atomic

CLASSES = "classes"  # the names of the classes, in the order of `probabilities`: metadata, since no item has its own
Columns = Mapping[str, np.ndarray | Sequence[Any]]


def predictions_file(directory: Path, evaluation: str) -> Path:
    """The file with the predictions of a stage (its folder) in an evaluation."""
    return directory / PREDICTIONS / f"{evaluation}.parquet"


def write_predictions(directory: Path, evaluation: str, columns: Columns) -> None:
    """Write the columns of an evaluation, atomically; equal columns give equal bytes. directory: of the stage.

    columns: arrays or lists with an entry for each item; an array [items, n] becomes a list of n for each item.
    "classes", names of classes, is kept as metadata. Raises NotWritten if the disk refuses, ValueError for columns of
    different lengths.
    """
    arrays = {name: _column(values) for name, values in columns.items() if name != CLASSES}
    metadata = {CLASSES: json.dumps(list(columns[CLASSES]))} if CLASSES in columns else None
    if len({len(each) for each in arrays.values()}) > 1:
        lengths = ", ".join(f"{name} {len(each)}" for name, each in arrays.items())
        raise ValueError(f"predictions of {evaluation!r}: columns of different lengths: {lengths}")
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(arrays, metadata=metadata), sink, compression="zstd")
    path = predictions_file(directory, evaluation)
    with writing(path):
        write_atomic(path, sink.getvalue().to_pybytes())


def read_predictions(directory: Path, evaluation: str) -> dict[str, np.ndarray] | None:
    """The columns as written; None if the file does not exist. Raises UserError if it is damaged.

    Numbers have their dtypes, texts are objects (str), a list column is an array [items, n] if all lists have the same
    length, else objects (arrays). "classes" is there if the evaluation has classes.
    """
    path = predictions_file(directory, evaluation)
    if not path.is_file():
        return None
    try:
        table = pq.read_table(path, partitioning=None)
        metadata = table.schema.metadata or {}
        columns = {name: _array(table.column(name)) for name in table.column_names}
        if (names := metadata.get(CLASSES.encode())) is not None:
            columns[CLASSES] = np.array(json.loads(names), object)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read ({error}); restore it, or delete it and evaluate again") from error
    return columns


def _column(values: np.ndarray | Sequence[Any]) -> pa.Array:
    if isinstance(values, np.ndarray) and values.ndim == 2:
        flat = pa.array(np.ascontiguousarray(values).reshape(-1))
        offsets = np.arange(len(values) + 1, dtype=np.int32) * np.int32(values.shape[1])
        return pa.ListArray.from_arrays(pa.array(offsets), flat)
    try:
        return pa.array(values)
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold
        return pa.array([text.encode(errors="replace").decode() for text in values])


def _array(column: pa.ChunkedArray) -> np.ndarray:
    if not pa.types.is_list(column.type):
        return column.to_numpy()
    lists = column.combine_chunks()
    lengths = lists.value_lengths().to_numpy()
    if len(lengths) and (lengths == lengths[0]).all():
        return lists.flatten().to_numpy(zero_copy_only=False).reshape(len(lengths), -1)
    return lists.to_numpy(zero_copy_only=False)

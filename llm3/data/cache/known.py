"""The tokens that another cache of the same rows has, for example one with other labels."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from llm3.data.cache import shards
from llm3.data.tokenizer import Tokenizer


def known_tokens(
    same_texts: Sequence[Path], row_format: ModuleType, tokenizer: Tokenizer
) -> Callable[[int], list[list[int]]]:
    """A function from the number of a row to the tokens of its texts, [] where no intact shard holds them.

    same_texts: directories of shards with the same row format and tokenizer, which may be missing or damaged
    """
    if not hasattr(row_format, "encoded_texts"):
        return lambda row: []
    found: dict[int, np.ndarray] = {}
    for directory in same_texts:
        try:
            found |= _documents(directory)
        except (OSError, ValueError, KeyError):  # not built yet, removed meanwhile, or damaged
            continue
    return lambda row: row_format.encoded_texts(found[row], tokenizer) if row in found else []


def _documents(shard: Path) -> dict[int, np.ndarray]:
    """{row: tokens of its document} of an intact shard. Raises OSError, ValueError or KeyError."""
    shards.check_shard(shard)
    metadata = shards.read_with_digest(shard / shards.SHARD)
    documents = np.load(shard / shards.DOCUMENTS)
    stream = np.fromfile(shard / shards.STREAM, metadata["dtype"])
    parts = np.split(stream, np.cumsum(documents["tokens"])[:-1])
    return dict(zip(documents["row"].tolist(), parts, strict=True)) if len(documents) else {}

"""The texts of a run, by name: sources tokenized once, and cut into windows as an objective or evaluation asks."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from llm3.config import SourceConfig
from llm3.data import cache, packing, sources
from llm3.data.tokenizer import Tokenizer
from llm3.errors import UserError, nearest

WINDOWS = {"stream": packing.StreamWindows, "pieces": packing.PieceWindows, "examples": packing.ExampleWindows}


class Library:
    """Sources by name, with one tokenizer and one cache directory. What was read once is kept."""

    def __init__(self, configs: dict[str, SourceConfig], tokenizer: Tokenizer, cache_dir: Path):
        check_writable(cache_dir)
        self.configs, self.tokenizer, self.cache_dir = configs, tokenizer, cache_dir
        self._caches: dict[tuple[str, str], cache.TokenCache] = {}
        self._hashes: dict[tuple[str, str], np.ndarray] = {}
        self._windows: dict[tuple, Any] = {}

    def cache(self, name: str, split: str) -> cache.TokenCache:
        """The tokens of one split of a source. Class numbers are those of its train split."""
        if name not in self.configs:
            raise UserError(f"source {name!r}: {nearest(name, self.configs)}")
        if (name, split) not in self._caches:
            source = self.configs[name]
            labels = self.labels(name) if source.label and split != "train" else None
            dataset = sources.load(source, split, cache_dir=self.cache_dir)
            built = cache.build(dataset, self.tokenizer, self.cache_dir, labels=labels)
            self._caches[name, split] = built
        return self._caches[name, split]

    def labels(self, name: str) -> list[str]:
        """The class names of a labelled source. Raises UserError where it has no labels."""
        if name in self.configs and not self.configs[name].label:
            raise UserError(f"source {name!r} has no labels: set sources.{name}.label to the field that holds them")
        return self.cache(name, "train").label_names

    def windows(self, kind: str, name: str, split: str, length: int, max_documents: int = 0) -> Any:
        """A table of windows: "stream", "pieces" or "examples"; see `llm3.data.packing`. max_documents 0: all."""
        key = (kind, name, split, length, max_documents)
        if key not in self._windows:
            tokens = self.cache(name, split)
            self._windows[key] = WINDOWS[kind](tokens.first(max_documents) if max_documents else tokens, length)
        return self._windows[key]

    def overlap(self, name: str, split: str, training: Iterable[str]) -> int:
        """How many documents of a split are, text for text, in the train split of any of the sources `training`.

        Documents without text do not count. The train split of one of these sources is measured on purpose: 0.
        """
        training = set(training)
        if split == "train" and name in training:
            return 0
        trained_on = [self._text_hashes(source, "train") for source in sorted(training)]
        return int(np.isin(self._text_hashes(name, split), np.concatenate(trained_on)).sum()) if trained_on else 0

    def _text_hashes(self, name: str, split: str) -> np.ndarray:
        if (name, split) not in self._hashes:
            tokens = self.cache(name, split)
            self._hashes[name, split] = tokens.document_hashes()[tokens.document_bytes > 0]
        return self._hashes[name, split]


def check_writable(cache_dir: Path) -> None:
    """Create the cache directory. Raises UserError where it cannot be created or written to."""
    try:
        Path(cache_dir).mkdir(parents=True, exist_ok=True)
        if not os.access(cache_dir, os.W_OK | os.X_OK):
            raise PermissionError("permission denied")
    except OSError as error:
        raise UserError(
            f"config: cache_dir={str(cache_dir)!r} cannot be created or written to: {error.strerror or error}"
        ) from None


def training_texts(configs: dict[str, SourceConfig], names: list[str], cache_dir: Path):
    """The texts of the train splits of these sources, one after another."""
    check_writable(cache_dir)
    for name in names:
        if name not in configs:
            raise UserError(f"tokenizer.sources: {name!r}: {nearest(name, configs)}")
        yield from sources.load(configs[name], "train", cache_dir=cache_dir)["text"]

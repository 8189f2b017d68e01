"""The texts of a run, by name: sources tokenized once, and cut into windows as an objective or evaluation asks."""

from pathlib import Path
from typing import Any

from llm3.config import SourceConfig
from llm3.data import cache, packing, sources
from llm3.data.tokenizer import Tokenizer
from llm3.errors import UserError, nearest

WINDOWS = {"stream": packing.StreamWindows, "pieces": packing.PieceWindows, "examples": packing.ExampleWindows}


class Library:
    """Sources by name, with one tokenizer and one cache directory. What was read once is kept."""

    def __init__(self, configs: dict[str, SourceConfig], tokenizer: Tokenizer, cache_dir: Path):
        self.configs, self.tokenizer, self.cache_dir = configs, tokenizer, cache_dir
        self._caches: dict[tuple[str, str], cache.TokenCache] = {}

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
        tokens = self.cache(name, split)
        return WINDOWS[kind](tokens.first(max_documents) if max_documents else tokens, length)


def training_texts(configs: dict[str, SourceConfig], names: list[str], cache_dir: Path):
    """The texts of the train splits of these sources, one after another."""
    for name in names:
        if name not in configs:
            raise UserError(f"tokenizer.sources: {name!r}: {nearest(name, configs)}")
        yield from sources.load(configs[name], "train", cache_dir=cache_dir)["text"]

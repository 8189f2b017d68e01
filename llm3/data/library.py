"""The data of a run: sources by name, tokenized once, and cut into windows for each objective or evaluation."""

import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import os
import sys
from contextlib import suppress
from pathlib import Path

from llm3.config.data_schema import SourceConfig
from llm3.data import tokenizer, windows
from llm3.data.cache import cache
from llm3.data.cache.token_cache import TokenCache
from llm3.data.packing import Windows, check_windows
from llm3.data.sources import selection
from llm3.data.sources import split as sources
from llm3.data.tokenizer import Tokenizer
from llm3.distributed import interrupts
from llm3.errors import UserError, counted, nearest
from llm3.registry import load_plugin


class Library:
    """Sources by name, with one tokenizer and one cache directory. Token caches and windows are opened only once."""

    def __init__(self, configs: dict[str, SourceConfig], tokenizer: Tokenizer, cache_dir: Path, template: str = ""):
        check_directory(cache_dir)
        self.configs, self.tokenizer, self.cache_dir, self.template = configs, tokenizer, cache_dir, template
        self._caches: dict[tuple[str, str], TokenCache] = {}
        self._windows: dict[tuple, Windows] = {}

    def cache(self, name: str, split: str) -> TokenCache:
        """The token cache of one split of a source. All splits number the classes as the train split does."""
        if (name, split) not in self._caches:
            labels = self.labels(name) if self._source(name).label and split != "train" else None
            built = self.build_split(name, split, labels=labels)
            assert built is not None  # only a share of a split can be incomplete
            self._caches[name, split] = built
        return self._caches[name, split]

    def build_split(
        self, name: str, split: str, *, labels: list[str] | None = None, shard: tuple[int, int] | None = None
    ) -> TokenCache | None:
        """Tokenize a split, or share i of n of it with shard=(i, n); None while other shares are missing."""
        source = self._source(name)
        records = sources.open_split(source, split, cache_dir=self.cache_dir)
        return cache.build_cache(
            records,
            source.row_format,
            self.tokenizer,
            self.cache_dir,
            template=self.template,
            max_bad_share=source.bad_rows,
            labels=labels,
            shard=shard,
        )

    def _source(self, name: str) -> SourceConfig:
        if name not in self.configs:
            raise UserError(f"source {name!r}: {nearest(name, self.configs)}")
        return self.configs[name]

    def labels(self, name: str) -> list[str]:
        """The class names of a labelled source. Raises UserError where it has no labels, or the same for each row."""
        if not self._source(name).label:
            raise UserError(f"source {name!r} has no labels: set sources.{name}.label to the field with the class")
        train = self.cache(name, "train")
        if len(train.label_sets or train.label_names) < 2:
            same = ", ".join(map(repr, train.label_names)) or "no class"
            raise UserError(
                f"source {name!r}: its {counted(train.documents, 'row')} all have the label {same}: expected two "
                f"classes or more in sources.{name}.label={self._source(name).label!r}"
            )
        return train.label_names

    def windows(self, kind: str, name: str, split: str, length: int) -> Windows:
        """The windows of a split; kind: a plugin of `llm3.data.windows`. length: positions of a window."""
        key = (kind, name, split, length)
        if key not in self._windows:
            table = load_plugin(windows, kind).WindowTable(self.cache(name, split), length)
            self._windows[key] = check_windows(table, f"source {name!r}: {split} split", length)
        return self._windows[key]


def check_directory(cache_dir: Path) -> None:
    """Create the cache directory. Raises UserError if it cannot be created; it may be read-only if it is complete."""
    try:
        Path(cache_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"config.cache_dir={str(cache_dir)!r} cannot be created or written to: {error.strerror or error}"
        ) from None


def trained_tokenizer(
    configs: dict[str, SourceConfig], names: list[str], cache_dir: Path, *, vocab_size: int, train_bytes: int
) -> Tokenizer:
    """A tokenizer trained on up to `train_bytes` of these sources' train splits, or the same one from the cache."""
    check_directory(cache_dir)
    for name in names:
        if name not in configs:
            raise UserError(f"tokenizer.sources: {name!r}: {nearest(name, configs)}")
    # also on what `drop` leaves out: else all would be tokenized again, with other n-grams
    complete = [dataclasses.replace(configs[name], drop="") for name in names]
    splits = [sources.open_split(each, "train", cache_dir=cache_dir) for each in complete]
    library = f"tokenizers {importlib.metadata.version('tokenizers')}"  # its versions may choose other merges
    settings = [vocab_size, train_bytes, library, *(each.key for each in splits)]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    file = cache_dir / f"tokenizer-{key[:16]}.json"
    if file.is_file():
        with suppress(OSError):  # read-only
            os.utime(file)  # when it was last used
        try:
            return Tokenizer.load(file)
        except UserError as error:
            print(f"tokens: {error}: it is trained again", file=sys.stderr)
    cache.check_writable(cache_dir, "the tokenizer")
    print(f"tokens: training a tokenizer on {', '.join(names)}", file=sys.stderr)
    texts = itertools.chain.from_iterable(each.texts() for each in splits)
    with interrupts.doing("training a tokenizer"):
        tokenizer.train(selection.sample_texts(texts, train_bytes), vocab_size).save(file)
    return Tokenizer.load(file)

"""A run with its texts read and its stages checked, before any device is touched."""

import hashlib
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax

from llm3 import evals, objectives
from llm3.config import ModelConfig, RunConfig, SourceConfig
from llm3.data import tokenizer as tokenizers
from llm3.data.library import Library, training_texts
from llm3.data.mixture import Mixture
from llm3.data.sources import resolved
from llm3.errors import UserError
from llm3.handoff import INIT
from llm3.workdir import TOKENIZER, tokenizer_sources


@dataclass
class Experiment:
    """What the verbs work on: the config, its texts and tokenizer, and what follows from them for each stage."""

    config: RunConfig
    workdir: Path
    order: list[str]  # stages, parents first
    tokenizer: tokenizers.Tokenizer
    library: Library
    _mixtures: dict[str, Mixture] = field(default_factory=dict)

    @cached_property
    def compute_dtype(self) -> str:
        """bfloat16 where the devices are built for it, unless the config says otherwise."""
        if self.config.model.compute_dtype != "auto":
            return self.config.model.compute_dtype
        return "float32" if jax.default_backend() == "cpu" else "bfloat16"

    def seed(self, name: str) -> int:
        """The seed of a stage's data order and dropout (or of the untrained parameters, "init"), folded by name.

        Stages with a seed of their own, of one kind, see the same batches in the same order: they can be paired.
        """
        stage = self.config.stages.get(name)
        own = stage is not None and stage.seed is not None
        return _folded(f"{self.given_seed(name)}/{stage.kind if own else name}")

    def given_seed(self, name: str) -> int:
        """The seed that the config gives a stage: its own, else the run's."""
        stage = self.config.stages.get(name)
        return self.config.seed if stage is None or stage.seed is None else stage.seed

    def fresh_seed(self, name: str) -> int:
        """The seed of the leaves that are new in a stage."""
        return _folded(f"{self.given_seed(name)}/{INIT}")

    def labels(self, name: str) -> list[str]:
        """The classes of a stage's task head; empty without a head. Raises UserError where its sources disagree."""
        stage = self.config.stages.get(name)
        if stage is None or not objectives.load(stage.objective).NEEDS_HEAD:
            return []
        labels = {source: self.library.labels(source) for source in stage.data}
        first = next(iter(labels.values()))
        if any(each != first for each in labels.values()):
            raise UserError(f"config.stages.{name}.data: the sources {', '.join(labels)} have different labels")
        return first

    def model(self, name: str) -> ModelConfig:
        """The model of a stage (or of "init"): the config's, with the vocabulary, classes, dtype and adapters."""
        stage = self.config.stages.get(name)
        return replace(
            self.config.model,
            vocab_size=self.tokenizer.vocab_size,
            classes=len(self.labels(name)),
            compute_dtype=self.compute_dtype,
            adapters=tuple(stage.adapters.items()) if stage else (),
            read_out=self._read_out(name),
        )

    def _read_out(self, name: str) -> int:
        """How many labels a training window of a stage has at most, where each is read at one place."""
        stage = self.config.stages.get(name)
        if stage is None or self.config.model.pool != "last" or objectives.load(stage.objective).WINDOWS != "examples":
            return 0
        return max(table.most for table in self.tables(name).values())

    @property
    def extends(self) -> str | None:
        """The hash of the tokenizer that `tokenizer.add` puts tokens behind."""
        add = self.config.tokenizer.add
        return self.tokenizer.without(add).hash if add else None

    def mixture(self, name: str) -> Mixture:
        """The batches of a stage."""
        if name not in self._mixtures:
            stage = self.config.stages[name]
            self._mixtures[name] = Mixture(self.tables(name), stage.data, stage.batch_size, self.seed(name))
        return self._mixtures[name]

    def tables(self, name: str) -> dict[str, Any]:
        """The windows of each source of a stage."""
        stage = self.config.stages[name]
        kind = objectives.load(stage.objective).WINDOWS
        return {source: self.library.windows(kind, source, "train", stage.sequence_length) for source in stage.data}

    def data_facts(self, name: str) -> dict[str, list[str]]:
        """In words, for each source of a stage: its size, what packing wastes and cuts, and how often it is seen."""
        epochs, facts = self.mixture(name).epochs(self.config.stages[name].steps), {}
        for source, table in self.tables(name).items():
            cut = f", {table.truncated} of them cut to fit a window" if table.truncated else ""
            documents = f"{self.library.cache(source, 'train').documents:,} documents{cut}"
            facts[source] = [documents, f"{len(table):,} windows", f"{100 * table.waste:.1f} % padding"]
            facts[source].append(f"{epochs[source]:.2g} epochs")
        return facts

    def fingerprints(self, name: str) -> dict[str, str]:
        """What the training data of a stage is, by content."""
        return {source: self.library.cache(source, "train").fingerprint for source in self.config.stages[name].data}

    def evaluation_windows(self, name: str) -> Any:
        """The windows of an evaluation."""
        e = self.config.evaluations[name]
        return self.library.windows(evals.load(e.kind).WINDOWS, e.source, e.split, e.sequence_length, e.max_documents)


def _folded(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little") >> 1


def prepare(config: RunConfig, workdir: Path, order: list[str]) -> Experiment:
    """Read, tokenize and cut all that the stages and evaluations need. Raises UserError before any device work.

    Only the cache directory is written to.
    """
    cache_dir = Path(config.cache_dir) if config.cache_dir else workdir / "cache"
    local = {name: resolved(source, config.data_dir) for name, source in config.sources.items()}
    tokenizer = load_tokenizer(config, local, workdir, cache_dir)
    experiment = Experiment(config, workdir, order, tokenizer, Library(local, tokenizer, cache_dir))
    for name in order:
        experiment.labels(name)
        experiment.mixture(name)
    for name, evaluation in config.evaluations.items():
        if evals.load(evaluation.kind).NEEDS_HEAD:
            experiment.library.labels(evaluation.source)
        experiment.evaluation_windows(name)
    return experiment


def load_tokenizer(
    config: RunConfig, sources: dict[str, SourceConfig], workdir: Path, cache_dir: Path
) -> tokenizers.Tokenizer:
    """The run's tokenizer: the one saved with it, else the one at `tokenizer.path`, else a new one (in the cache)."""
    saved, add = workdir / TOKENIZER, config.tokenizer.add
    if add and not config.tokenizer.path:
        raise UserError(f"config.tokenizer.add={add}: needs tokenizer.path, the tokenizer that they are added to")
    if saved.is_file():
        return tokenizers.Tokenizer.load(saved)
    if config.tokenizer.path:
        loaded = tokenizers.Tokenizer.load(Path(config.tokenizer.path))
        return loaded.extended(add) if add else loaded
    if not (names := tokenizer_sources(config)):
        raise UserError("config.tokenizer: without a pretrain stage, give the parent's tokenizer.json as path")
    content = hashlib.sha256(str(config.tokenizer.vocab_size).encode())
    for text in training_texts(sources, names, cache_dir):
        content.update(hashlib.sha256(text.encode()).digest())
    cached = cache_dir / f"tokenizer-{content.hexdigest()[:16]}.json"
    if not cached.is_file():
        tokenizers.train(training_texts(sources, names, cache_dir), config.tokenizer.vocab_size).save(cached)
    return tokenizers.Tokenizer.load(cached)

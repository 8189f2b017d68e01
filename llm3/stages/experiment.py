"""A run with its texts read and its stages checked, before any device is touched."""

import hashlib
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import jax
import numpy as np

from llm3 import evals, objectives
from llm3.config.schema import ModelConfig, RunConfig, SourceConfig
from llm3.data import tokenizer as tokenizers
from llm3.data import windows
from llm3.data.cache.cache import TokenCache
from llm3.data.chat_templates import load_template
from llm3.data.contamination import Overlap, remembered
from llm3.data.library import Library, trained_tokenizer
from llm3.data.mixture import Mixture
from llm3.data.mixture_weights import schedule_of
from llm3.data.packing import Windows
from llm3.data.sources.split import resolved
from llm3.errors import UserError
from llm3.handoff.parent import INIT
from llm3.objectives import Task
from llm3.stages import rules as stages
from llm3.stages.workdir import RECORD, TOKENIZER, read_json, tokenizer_sources


@dataclass
class Experiment:
    """What the verbs work on: the config, its texts and tokenizer, and what follows from them for each stage."""

    config: RunConfig
    workdir: Path
    order: list[str]  # stages, parents first
    tokenizer: tokenizers.Tokenizer
    library: Library
    _mixtures: dict[str, Mixture] = field(default_factory=dict)
    _overlaps: dict[str, Overlap] | None = None

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

    def task(self, name: str) -> Task:
        """What the objective of a stage is given besides batches."""
        stage = self.config.stages[name]
        peer = objectives.load(stage.objective_name)
        options = objectives.read_options(peer, stage.objective_options, f"config.stages.{name}.objective")
        return Task(options, self.tokenizer, stage.sequence_length, self._label_sets(name))

    def labels(self, name: str) -> list[str]:
        """The outputs of a stage's task head, the classes or what else they are; empty without a head.

        Raises UserError where its sources disagree.
        """
        stage = self.config.stages.get(name)
        head = objectives.load(stage.objective_name).HEAD if stage else ""
        if head != "labels":
            return list(head)
        labels = {source: self.library.labels(source) for source in stage.data}
        first = next(iter(labels.values()))
        if any(each != first for each in labels.values()):
            raise UserError(f"config.stages.{name}.data: the sources {', '.join(labels)} have different labels")
        return first

    def _label_sets(self, name: str) -> np.ndarray | None:
        """Which classes each target of a stage stands for, float32 [S, C]; None where a target is a class."""
        stage = self.config.stages[name]
        if objectives.load(stage.objective_name).HEAD != "labels":
            return None
        sets = [self.library.cache(source, "train").label_sets for source in stage.data]
        if any(each != sets[0] for each in sets):
            raise UserError(f"config.stages.{name}.data: sources with several labels a document cannot be mixed")
        if sets[0] is None:
            return None
        matrix = np.zeros((len(sets[0]), len(self.labels(name))), np.float32)
        for target, classes in enumerate(sets[0]):
            matrix[target, classes] = 1
        return matrix

    def applies(self, evaluation: str, name: str) -> bool:
        """Whether an evaluation can be made of a stage (or of "init"): it has the task head that is asked for."""
        stage, config = self.config.stages.get(name), self.config.evaluations[evaluation]
        head = evals.load(config.kind).HEAD
        if not head:
            return True
        same = stage is not None and head == objectives.load(stage.objective_name).HEAD
        return same and (head != "labels" or self.labels(name) == self.library.labels(config.source))

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
        """In how many places of a training window at most the model is read; 0 where that is not known.

        A window that is cut over devices is computed at all of its places, each where it lies.
        """
        if (stage := self.config.stages.get(name)) is None or self.config.mesh.context != 1:
            return 0
        peer = objectives.load(stage.objective_name)
        if hasattr(peer, "most"):
            return peer.most(self.task(name))
        if peer.HEAD != "labels" or self.config.model.pool != "last":
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
            stage, tables, task = self.config.stages[name], self.tables(name), self.task(name)
            peer = objectives.load(stage.objective_name)
            corrupt = partial(peer.corrupt, task=task) if hasattr(peer, "corrupt") else None
            self._mixtures[name] = Mixture(
                tables, self.schedule(name), stage.batch_size, self.seed(name), by=stage.weights, corrupt=corrupt
            )
        return self._mixtures[name]

    def schedule(self, name: str) -> list[tuple[int, dict[str, float]]]:
        """The weights of a stage's sources, from which step on."""
        stage = self.config.stages[name]
        return schedule_of(
            data=stage.data,
            temperature=stage.temperature,
            data_schedule=stage.data_schedule,
            replay=stage.replay,
            parent=self._parent_data(name) if stage.replay else None,
            tokens={source: self.library.cache(source, "train").tokens for source in self.sources(name)},
            steps=stage.steps,
            where=f"config.stages.{name}",
        )

    def _parent_data(self, name: str) -> dict[str, float] | None:
        """The weights of the parent's sources; None without a parent that trained."""
        stage = self.config.stages[name]
        if (parent := stages.parent_name(stage)) in self.config.stages:
            return self.schedule(parent)[-1][1]
        if not (isinstance(stage.start, dict) and stage.start.get("run")):
            return None
        record = read_json(Path(stage.start["run"]) / stage.start["stage"] / RECORD)
        return record and record["stage"]["data"]

    def sources(self, name: str) -> list[str]:
        """The sources that a stage draws from. Raises UserError for one of the parent's that this config lacks."""
        stage, names = self.config.stages[name], stages.data_sources(self.config, name)
        for source in (self._parent_data(name) or ()) if stage.replay else ():
            if source not in self.config.sources:
                raise UserError(f"config.stages.{name}.replay: the parent's source {source!r} is not in config.sources")
            names += [] if source in names else [source]
        return names

    def tables(self, name: str) -> dict[str, Windows]:
        """The windows of each source of a stage."""
        stage, task = self.config.stages[name], self.task(name)
        peer = objectives.load(stage.objective_name)
        length = peer.raw_length(task) if hasattr(peer, "raw_length") else stage.sequence_length
        return {
            source: self.library.windows(peer.WINDOWS[self.config.sources[source].form], source, "train", length)
            for source in self.sources(name)
        }

    def data_facts(self, name: str) -> dict[str, list[str]]:
        """In words, for each source of a stage: its size, what packing wastes and cuts, and how often it is seen."""
        epochs, facts = self.mixture(name).epochs(self.config.stages[name].steps), {}
        for source, table in self.tables(name).items():
            tokens = self.library.cache(source, "train")
            lost = [f"{table.truncated:,} of them cut to fit a window"] if table.truncated else []
            lost += [f"{table.dropped:,} left out: nothing to learn from is left of them"] if table.dropped else []
            lost += [f"{sum(tokens.bad.values()):,} bad rows set aside"] if tokens.bad else []
            facts[source] = [", ".join([f"{tokens.documents:,} documents", *lost])]
            facts[source] += [f"{len(table):,} windows", f"{100 * table.waste:.1f} % padding"]
            facts[source].append(f"{epochs[source]:.2g} epochs")
        return facts

    def fingerprints(self, name: str) -> dict[str, str]:
        """What the training data of a stage is, by content."""
        return {source: self.library.cache(source, "train").fingerprint for source in self.sources(name)}

    def evaluation_cache(self, name: str) -> TokenCache:
        """The documents of an evaluation."""
        e = self.config.evaluations[name]
        tokens = self.library.cache(e.source, e.split)
        return tokens.first(e.max_documents) if e.max_documents else tokens

    def evaluation_kind(self, name: str) -> str:
        """How the documents of an evaluation are cut."""
        e = self.config.evaluations[name]
        return evals.load(e.kind).WINDOWS[self.config.sources[e.source].form]

    def overlaps(self) -> dict[str, Overlap]:
        """For each evaluation, what of its texts is in the training data of the stages."""
        if self._overlaps is None:
            training = sorted({source for name in self.order for source in self.sources(name)})
            self._overlaps = {}
            for name, e in self.config.evaluations.items():
                # the train split of a source is measured on purpose
                others = [self.library.cache(s, "train") for s in training if (s, "train") != (e.source, e.split)]
                self._overlaps[name] = remembered(self.evaluation_cache(name), others, Path(self.library.cache_dir))
        return self._overlaps


def _folded(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little") >> 1


def prepare(config: RunConfig, workdir: Path, order: list[str]) -> Experiment:
    """Read, tokenize and cut all that the stages and evaluations need. Raises UserError before any device work.

    Only the cache directory is written to.
    """
    library = read_library(config, workdir)
    experiment = Experiment(config, workdir, order, library.tokenizer, library)
    for name in order:
        experiment.labels(name)
        experiment.mixture(name)
    for name, evaluation in config.evaluations.items():
        if evals.load(evaluation.kind).HEAD == "labels":
            experiment.library.labels(evaluation.source)
        windows.load(experiment.evaluation_kind(name)).Table(
            experiment.evaluation_cache(name), evaluation.sequence_length
        )
    return experiment


def read_library(config: RunConfig, workdir: Path) -> Library:
    """The sources of a run with its tokenizer; no text is tokenized yet. Raises UserError."""
    cache_dir = Path(config.cache_dir) if config.cache_dir else workdir / "cache"
    local = {name: resolved(source, config.data_dir) for name, source in config.sources.items()}
    template = load_template(config.tokenizer.chat_template) if config.tokenizer.chat_template else ""
    return Library(local, load_tokenizer(config, local, workdir, cache_dir), cache_dir, template)


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
    sizes = {"vocab_size": config.tokenizer.vocab_size, "train_bytes": config.tokenizer.train_bytes}
    return trained_tokenizer(sources, names, cache_dir, **sizes)

"""A run with its data read and its stages and evaluations resolved, before any device is used."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from llm3 import evals
from llm3.config.model_schema import ModelConfig, check_length
from llm3.config.schema import RunConfig
from llm3.data import tokenizer as tokenizers
from llm3.data.cache.place import cache_directory
from llm3.data.cache.token_cache import TokenCache
from llm3.data.chat_templates import read_template
from llm3.data.contamination import Contamination, cached_contamination
from llm3.data.library import Library
from llm3.data.prompts import check_prompts
from llm3.data.round_trip import RoundTrip
from llm3.data.sources.split import use_local_copy
from llm3.distributed.mesh_axes import MESH_AXES, table
from llm3.distributed.sharding import rules_in_force
from llm3.files import INIT
from llm3.registry import load_plugin
from llm3.stages.amendments import EVALUATED
from llm3.stages.evaluated import Entries, definition, entry
from llm3.stages.evaluation import Evaluation, data_digest, read_evaluation
from llm3.stages.model import init_model, vocabulary_size
from llm3.stages.stage import Stage, folded_seed, plan_stage, read_stage
from llm3.stages.tokenizer import check_parents_tokenizers, inherited_template, load_tokenizer


@dataclass
class Experiment:
    """A config with its library, its stages by name (parents first) and its evaluations."""

    config: RunConfig
    workdir: Path
    library: Library
    stages: dict[str, Stage]
    evaluations: list[Evaluation]
    compute_dtype: str
    _overlaps: dict[str, Contamination] = field(default_factory=dict)

    @property
    def tokenizer(self) -> tokenizers.Tokenizer:
        return self.library.tokenizer

    @property
    def init_model(self) -> ModelConfig:
        """The model before any stage."""
        rows = vocabulary_size(self.config, self.tokenizer)
        return replace(init_model(self.config, rows), compute_dtype=self.compute_dtype)

    @property
    def init_seed(self) -> int:
        """The seed of the untrained parameters."""
        return folded_seed(self.config.seed, INIT)

    @property
    def extends(self) -> str | None:
        """The hash of the tokenizer that `tokenizer.add` extends; None: it extends none."""
        add = self.config.tokenizer.add
        return self.tokenizer.without(add).hash if add else None

    @property
    def evaluation_entries(self) -> Entries:
        """What a row keeps of each evaluation, by name."""
        return {
            each.name: entry(definition(self.config, each.name), each.data_digest, each.better)
            for each in self.evaluations
        }

    def round_trips(self) -> dict[str, RoundTrip]:
        """{source of a stage: how much of its texts their tokens hold}; {} if the tokenizer loses nothing."""
        caches = {name: each for stage in self.stages.values() for name, each in stage.data.caches.items()}
        return {name: each.round_trip for name, each in caches.items() if each.round_trip is not None}

    def overlaps(self) -> dict[str, Contamination]:
        """For each evaluation, the overlap of its documents with the training data of the stages."""
        for each in self.evaluations if not self._overlaps else ():
            if each.cache is not None:
                others = self.training_beside(each).values()
                self._overlaps[each.name] = cached_contamination(each.cache, others, Path(self.library.cache_dir))
        return self._overlaps

    def training_beside(self, evaluation: Evaluation) -> dict[str, TokenCache]:
        """{source: its documents} that the stages train on, except those that the evaluation measures on purpose."""
        training = sorted({source for stage in self.stages.values() for source in stage.data.caches})
        measured = (evaluation.config.source, evaluation.config.split)
        return {source: self.library.cache(source, "train") for source in training if (source, "train") != measured}


def prepare(config: RunConfig, workdir: Path, order: list[str]) -> Experiment:
    """Read, tokenize and pack the data of the stages and evaluations. Raises UserError before any device work.

    Writes only to the cache directory.
    """
    check_without_data(config, workdir, order)
    library = read_library(config, workdir)
    check_parents_tokenizers(config, workdir, order, library.tokenizer)
    model = init_model(config, vocabulary_size(config, library.tokenizer))  # raises UserError
    check_prompts(config.samples, config.sample_tokens, model, library.tokenizer, library.template, "config.samples")
    quick = {
        name: read_evaluation(config, name, library) for name, each in config.evaluations.items() if not each.source
    }
    stages = [read_stage(config, name, workdir, library) for name in order]
    evaluations = [quick.get(name) or read_evaluation(config, name, library) for name in config.evaluations]
    dtype = chosen_dtype(config)
    measured = {EVALUATED: {each.name: digest[:12] for each in evaluations if (digest := each.data_digest)}}
    computed = {each.name: replace(each.computed_in(dtype), record=each.record | measured) for each in stages}
    return Experiment(config, workdir, library, computed, evaluations, dtype)


def read_evaluation_data(config: RunConfig, library: Library) -> dict[str, str]:
    """{evaluation with a source: the digest of its documents}. Raises UserError."""
    found = {}
    for name, own in config.evaluations.items():
        if own.source:
            cache = library.cache(own.source, own.split)
            documents = cache.first(own.max_documents) if own.max_documents else cache
            found[name] = data_digest(load_plugin(evals, own.kind), documents)
    return found


def check_without_data(config: RunConfig, workdir: Path, order: list[str]) -> None:
    """Raise UserError, before hours of tokenizing, for rules and optimizers that do not fit the model."""
    shape = dict.fromkeys(MESH_AXES, 1)
    one = AbstractMesh(tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * len(shape))
    for name, evaluation in config.evaluations.items():
        check_length(config.model, evaluation.sequence_length, f"config.evaluations.{name}.sequence_length")
    with rules_in_force(table(config.mesh.rules)):
        for name in order:
            plan_stage(config, name, workdir).computed_in("float32").phases(cast(Mesh, one))


def chosen_dtype(config: RunConfig) -> str:
    """The config's compute dtype, or for "auto" bfloat16 on accelerators and float32 on CPUs."""
    if config.model.compute_dtype != "auto":
        return config.model.compute_dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def read_library(config: RunConfig, workdir: Path) -> Library:
    """The sources of a run with its tokenizer; does not tokenize documents yet. Raises UserError."""
    cache_dir = cache_directory(config.cache_dir, workdir)
    local = {name: use_local_copy(source, config.data_dir) for name, source in config.sources.items()}
    tokenizer = load_tokenizer(config, local, workdir, cache_dir)
    template = config.tokenizer.chat_template or inherited_template(config, workdir)
    return Library(local, tokenizer, cache_dir, read_template(template, workdir, tokenizer))

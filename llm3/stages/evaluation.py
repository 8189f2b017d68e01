"""An evaluation of a run, resolved: its plugin, options and documents."""

import hashlib
import json
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

from jax.sharding import Mesh

from llm3 import evals, objectives
from llm3.config.schema import EvaluationConfig, ModelConfig, RunConfig
from llm3.data import windows
from llm3.data.cache.token_cache import TokenCache
from llm3.data.library import Library
from llm3.data.packing import check_windows
from llm3.data.tokenizer import Tokenizer
from llm3.distributed import processes
from llm3.distributed.sharding import place_batch, place_rows, rows_of_process
from llm3.errors import UserError, within
from llm3.models.heads import without_task_head
from llm3.registry import check_installed, load_plugin, read_options
from llm3.stages.stage import Stage, check_tokenizer
from llm3.stages.truncation import truncation_warning


class Subject(NamedTuple):
    """A model to evaluate: a stage's, the untrained one, or the pretrained one. name: of its row.

    task_head: "" (none), "labels", or the names of its outputs, as `HEAD` of an objective. labels: those outputs.
    """

    name: str
    model: ModelConfig
    lm_head: bool = True
    task_head: str | tuple[str, ...] = ""
    labels: tuple[str, ...] | list[str] = ()


def subject_of(stage: Stage) -> Subject:
    """A trained stage, for its evaluations."""
    return Subject(stage.name, stage.model, stage.lm_head, stage.objective.HEAD, stage.labels)


def subject_of_checkpoint(name: str, model: ModelConfig, meta: dict) -> Subject:
    """The stage of a checkpoint, by its metadata."""
    objective = meta["config"]["stage"]["objective"]
    head = load_plugin(objectives, objective["name"] if isinstance(objective, dict) else objective).HEAD
    return Subject(name, model, meta["lm_head"], head, meta["labels"])


@dataclass(frozen=True)
class Evaluation:
    """One evaluation, resolved. kind: the kind of windows. labels: the classes of its source, if it classifies.

    cache: None for an evaluation without a source. prepared, template: see `EvalContext`. warning: what to change if
    much of the source does not fit into the windows; "": nothing.
    """

    name: str
    config: EvaluationConfig
    plugin: ModuleType
    options: Any
    kind: str = ""
    cache: TokenCache | None = None
    labels: list[str] | None = None
    prepared: Any = None
    template: str = ""
    warning: str = ""

    @property
    def better(self) -> dict[str, str]:
        """{metric by which the best checkpoint can be chosen: "higher" or "lower"}"""
        return self.plugin.better(self.prepared) if hasattr(self.plugin, "better") else self.plugin.BETTER

    @property
    def data_digest(self) -> str:
        """As `data_digest`."""
        return data_digest(self.plugin, self.cache)

    def applies(self, subject: Subject) -> bool:
        """Whether a model has the head that the evaluation reads."""
        if not self.plugin.HEAD:
            return subject.lm_head
        if subject.task_head != self.plugin.HEAD:
            return False
        return self.labels is None or subject.labels == self.labels

    def sampled(self, documents: int, where: str) -> "Evaluation":
        """This evaluation on a fixed sample of its documents; 0: on all. An evaluation without a source is not sampled.

        Raises UserError, starting with `where`, if none of them fits into a window.
        """
        if self.cache is None or not 0 < documents < self.cache.documents:
            return self
        cache = self.cache.first(documents)
        table = load_plugin(windows, self.kind).WindowTable(cache, self.config.sequence_length)
        check_windows(table, f"{where}: evaluation {self.name!r}", self.config.sequence_length)
        return replace(self, cache=cache)

    def measure(
        self,
        params: dict,
        model: ModelConfig,
        tokenizer: Tokenizer,
        mesh: Mesh,
        compiled: evals.Compiled,
        counting: evals.Counting = evals.uncounted,
    ) -> dict[str, Any]:
        """Metrics and details of parameters in one segment. compiled: compiled functions kept between calls."""
        if not self.plugin.HEAD:
            params, model = without_task_head(params, model)
        return self.plugin.evaluate(
            evals.EvalContext(
                params=params,
                model=model,
                config=self.config,
                options=self.options,
                kind=self.kind,
                cache=self.cache,  # type: ignore[arg-type]  # an evaluation without a source reads none
                tokenizer=tokenizer,
                place=partial(place_batch, mesh),
                compiled=compiled,
                template=self.template,
                prepared=self.prepared,
                counting=counting,
                own=_own_rows(mesh, self.config.batch_size),
            )
        )


def _own_rows(mesh: Mesh, batch_size: int) -> evals.OwnRows | None:
    """The rows of a batch that this process reads; None: it is the only one."""
    if processes.count() == 1:
        return None
    return evals.OwnRows(rows_of_process(mesh, batch_size), partial(place_rows, mesh, batch_size))


def data_digest(plugin: ModuleType, cache: TokenCache | None) -> str:
    """A digest of the documents of an evaluation; "" without documents.

    Runs with other tokenizers have the same one, unless the plugin's metrics depend on the tokenizer.
    """
    if cache is None:
        return ""
    if getattr(plugin, "PER_TOKEN", False):
        return cache.fingerprint
    return hashlib.sha256(cache.keys.tobytes() + json.dumps(cache.label_names).encode()).hexdigest()


def read_evaluation(config: RunConfig, name: str, library: Library) -> Evaluation:
    """The evaluation of this name with its documents read. Raises UserError."""
    own = config.evaluations[name]
    plugin = load_plugin(evals, own.kind)
    options = read_options(plugin, own.options, f"config.evaluations.{name}.options")
    check_tokenizer(plugin, library.tokenizer, options, f"config.evaluations.{name}")
    if not plugin.WINDOWS:
        return without_source(name, own, options, library.template, f"config.evaluations.{name}.options")
    labels = library.labels(own.source) if plugin.HEAD == "labels" else None
    tokens = library.cache(own.source, own.split)
    cache = tokens.first(own.max_documents) if own.max_documents else tokens
    kind = plugin.WINDOWS[config.sources[own.source].row_format]
    table = load_plugin(windows, kind).WindowTable(
        cache, own.sequence_length
    )  # raises UserError for a length too small
    where = f"config.evaluations.{name}"
    check_windows(table, f"{where}: source {own.source!r}", own.sequence_length)
    warning = truncation_warning(table, cache, own.source, own.sequence_length, f"{where}.sequence_length")
    return Evaluation(name, own, plugin, options, kind, cache, labels, warning=warning)


def without_source(name: str, config: EvaluationConfig, options: Any, template: str, where: str) -> Evaluation:
    """An evaluation without a source, prepared. where: what has the options, for errors. Raises UserError."""
    plugin = load_plugin(evals, config.kind)
    check_installed(plugin, f"evaluation {config.kind!r}")
    try:
        prepared = plugin.prepare(config, options, template)
    except UserError as error:
        raise within(where, error) from error.__cause__
    return Evaluation(name, config, plugin, options, prepared=prepared, template=template)

"""Every field of a run's config, with types and checks; `llm3.config.load` reads them.

This module does not import jax, so a misspelt field is reported before any device is used.
"""

import dataclasses
from typing import Any

from llm3.config.checks import check_early_stopping, check_optimizer, check_phases, check_ranges, check_warmup
from llm3.config.data_schema import SourceConfig, TokenizerConfig
from llm3.config.model_schema import AdapterConfig, ModelConfig
from llm3.errors import UserError, at_least, one_of
from llm3.files import RESERVED, check_name, local_path


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1 for the remaining devices. See `docs/cluster.md`."""

    data: int = -1  # number of copies of the parameters; each copy gets its own rows of the batch
    fsdp: int = 1  # number of parameter shards, gathered for use; each shard gets its own rows of the batch
    context: int = 1  # number of pieces that each window is split into
    tensor: int = 1  # number of shards of the heads, the hidden layers and the vocabulary
    across_hosts: str = ""  # the axis across hosts (or TPU slices): only it uses the slow network; "": none
    # overrides of the sharding rules: {logical axis: mesh axis, list of mesh axes, or None}
    rules: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer of a stage, its learning rates, and its average of the weights."""

    AMENDABLE = frozenset(  # the others decide what the optimizer's state is
        ("learning_rate", "schedule", "warmup_steps", "decay_steps", "final_fraction", "weight_decay", "clip_norm")
    )

    name: str = "adamw"  # adamw, adafactor, lion, muon or sgd
    learning_rate: float = 1e-3  # peak learning rate
    schedule: str = "cosine"  # constant, linear, cosine or wsd (warm-up, stable, decay)
    warmup_steps: int = 0  # steps of linear warm-up
    decay_steps: int = 0  # wsd only: steps of the final decay; 0: a tenth of all steps
    final_fraction: float = 0.1  # learning rate at the last step, as a fraction of the peak
    weight_decay: float = 0.1  # decoupled weight decay, on kernels, embeddings and adapters only
    clip_norm: float = 1.0  # clip gradients to this global norm; 0: no clipping
    layer_decay: float = 1.0  # multiply the learning rate by this for each layer further from the top; 1: no decay
    # pairs [rule, factor of the learning rate]; the first match wins
    learning_rates: list[Any] = dataclasses.field(default_factory=list)
    l2_sp: float = 0.0  # strength of the pull toward the parent's weights; 0: none
    # decay of an average of the weights that becomes the stage's result, at most (1 + t) / (10 + t) after t updates,
    # so that a short stage forgets its start; 0: no average
    ema: float = 0.0
    # adamw: how the moments of kernels, embeddings and adapters are stored: float32, bfloat16, or float8 (8 bits, and a
    # scale for up to 64 numbers)
    moments: str = "float32"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # further arguments of the optax function

    def __post_init__(self) -> None:
        check_optimizer(vars(self), "config: optimizer.*")


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """When to skip a step besides a non-finite loss or gradient, and when to end the run.

    The window starts anew with each phase of `unfreeze` and each mixture of `data_schedule`.
    """

    FREE = frozenset(("stop_after",))
    AMENDABLE = frozenset(("deviations", "window", "accept_after"))

    # skip updates whose loss or gradient norm exceeds the recent mean by this many standard deviations; 0: off
    deviations: float = 0.0
    window: int = 128  # number of recent steps that the mean and standard deviation are taken over
    # this many spikes in a row are a new level: the last one is accepted, and the window starts anew
    accept_after: int = 8
    stop_after: int = 10  # end the run with an error after this many non-finite steps in a row

    def __post_init__(self) -> None:
        at_least("guard.*.deviations", self.deviations, 0)
        at_least("guard.*.window", self.window, 2)
        at_least("guard.*.accept_after", self.accept_after, 1)
        at_least("guard.*.stop_after", self.stop_after, 1)


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stage: a parent, a data mixture, an objective, a rule for the trainable parameters, an optimizer."""

    FREE = frozenset(("log_every", "save_every", "save_minutes", "keep", "keep_every", "sample_every")) | {
        *("micro_batches", "frozen_memory", "baseline")
    }
    # with `patience` these decide the result; without, they are in no record, and may change as well
    VALIDATION = frozenset(("best", "eval_every", "eval_names", "eval_documents", "patience", "min_delta"))
    AMENDABLE = VALIDATION | {"steps", "batch_size", "data", "temperature", "data_schedule", "replay", "skip_steps"}

    kind: str  # pretrain, posttrain or finetune
    data: dict[str, float]  # the mixture: {source: weight}
    steps: int  # number of optimizer steps
    batch_size: int  # windows per step, over all devices
    sequence_length: int  # tokens per window
    weights: str = "tokens"  # unit of the weights of `data`: tokens or documents
    temperature: float = 0.0  # t > 0 multiplies each weight by (tokens of the source) ** (1 / t); 0: off
    # pairs [step, {source: weight}]: the mixture from that step on
    data_schedule: list[Any] = dataclasses.field(default_factory=list)
    # pairs [first, last] of steps, counted from 1, whose batches are left out: from `first` on, each step takes the
    # batch that so many steps later would have taken
    skip_steps: list[Any] = dataclasses.field(default_factory=list)
    replay: float = 0.0  # share of the mixture that repeats the parent's data, with the parent's weights
    # the parent: a stage of this run, dict(run=, stage=, step=, fresh=[...], drop=[...]), or a pretrained model:
    # dict(model=, revision=, fresh=[...], drop=[...])
    start: Any = None
    # a name, an import path ("my_package.losses:entropy"), or dict(name=..., and its options)
    objective: Any = "causal"
    train: Any = "all"  # trainable parameters: a rule, or a list of rules
    # pairs [step, rule]: parameters that become trainable at that step
    unfreeze: list[Any] = dataclasses.field(default_factory=list)
    adapters: dict[str, AdapterConfig] = dataclasses.field(default_factory=dict)  # low-rank adapters by name
    frozen: str = "float32"  # how frozen parameters are stored: float32, compute (the compute dtype), int8 or nf4
    # where frozen parameters of the layers wait: device, or host, from where each layer is copied for its use
    frozen_memory: str = "device"
    seed: int | None = None  # seed of the stage's data order and fresh parameters; None: from the run's seed
    order_seed: int | None = None  # another seed of the data order, masks and dropout; None: `seed`
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)  # the optimizer of the stage
    guard: GuardConfig = dataclasses.field(default_factory=GuardConfig)  # when to skip a step or end the run
    micro_batches: int = 1  # split each batch into this many parts and add up their gradients
    log_every: int = 10  # steps between log lines
    save_every: int = 100  # steps between checkpoints
    # also save at the first log line that comes this many minutes after the last save; 0: never
    save_minutes: float = 0.0
    keep: int = 2  # number of latest checkpoints to keep
    keep_every: int = 0  # also save each step that is a multiple of this, and keep its checkpoint for good; 0: none
    best: str = ""  # also keep the checkpoint that is best by this metric, e.g. domain_bits_per_byte
    eval_every: int = 0  # steps between evaluations while the stage trains; 0: evaluate only after it
    eval_names: list[str] = dataclasses.field(default_factory=list)  # evaluations to run then; empty: all that apply
    eval_documents: int = 0  # run them on a fixed pseudo-random sample of this many documents; 0: all
    # end the stage after this many evaluations in a row without an improvement of `best`, and take the parameters of
    # the best one as its result; 0: train all steps and take the last ones
    patience: int = 0
    min_delta: float = 0.0  # the least change of `best` that counts as an improvement
    sample_every: int = 0  # steps between samples (see `samples`) while the stage trains; 0: sample only after it
    baseline: bool = False  # report the stage separately from the main chain

    def __post_init__(self) -> None:
        one_of("stages.*.kind", self.kind, ("pretrain", "posttrain", "finetune"))
        one_of("stages.*.frozen", self.frozen, ("float32", "compute", "int8", "nf4"))
        one_of("stages.*.frozen_memory", self.frozen_memory, ("device", "host"))
        for name in ("steps", "batch_size", "sequence_length", "micro_batches", "log_every", "save_every", "keep"):
            at_least(f"stages.*.{name}", getattr(self, name), 1)
        for name in ("sample_every", "save_minutes", "keep_every"):
            at_least(f"stages.*.{name}", getattr(self, name), 0)
        check_early_stopping(vars(self), "config: stages.*")
        if self.batch_size % self.micro_batches:
            raise UserError(
                f"config: stages.*.batch_size={self.batch_size}: expected a multiple of micro_batches="
                f"{self.micro_batches}"
            )
        for name in self.adapters:
            check_name(name, "config: stages.*.adapters")
        if not self.data:
            raise UserError("config: stages.*.data is empty: expected {source: weight}")
        for source, weight in self.data.items():
            if not weight > 0:
                raise UserError(f"config: stages.*.data.{source}={weight!r}: expected a weight above 0")
        one_of("stages.*.weights", self.weights, ("tokens", "documents"))
        at_least("stages.*.temperature", self.temperature, 0)
        check_warmup(vars(self.optimizer), self.steps, "config: stages.*.optimizer")
        check_phases(self.data_schedule, self.steps, "config: stages.*.data_schedule")
        check_ranges(self.skip_steps, "config: stages.*.skip_steps")
        if not 0 <= self.replay < 1:
            raise UserError(f"config: stages.*.replay={self.replay!r}: expected a share from 0 up to, not including, 1")
        if not isinstance(self.objective_name, str):
            raise UserError(f"config: stages.*.objective={self.objective!r}: expected a name, or dict(name=, options)")

    @property
    def objective_name(self) -> str:
        """The name of the objective."""
        name: Any = self.objective.get("name") if isinstance(self.objective, dict) else self.objective
        return name

    @property
    def objective_options(self) -> dict[str, Any]:
        """The options of the objective in the config."""
        return {k: v for k, v in self.objective.items() if k != "name"} if isinstance(self.objective, dict) else {}


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """One evaluation, run on the untrained model and after each stage."""

    kind: str  # name or import path of the evaluation plugin
    source: str = ""  # the source it measures on; "": none, for a kind without a source
    split: str = "validation"  # train, validation or test
    sequence_length: int = 256  # tokens per window
    batch_size: int = 16  # windows per batch
    max_documents: int = 0  # evaluate on a fixed pseudo-random sample of this many documents; 0: all
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # options of the plugin

    def __post_init__(self) -> None:
        one_of("evaluations.*.split", self.split, ("train", "validation", "test"))
        for name in ("sequence_length", "batch_size"):
            at_least(f"evaluations.*.{name}", getattr(self, name), 1)
        at_least("evaluations.*.max_documents", self.max_documents, 0)


HANG_KINDS = ("wait", "load", "compile", "read", "compute", "evaluate", "sample", "save")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A whole experiment."""

    FREE = frozenset(("evaluations", "samples", "sample_tokens", "trackers", "mesh")) | {
        *("hang_seconds", "hang_limits", "check_memory", "cache_dir", "data_dir")
    }

    # the model that all stages share; of a pretrained model, or of the run that the first stage starts from, it follows
    # from there
    model: ModelConfig
    tokenizer: TokenizerConfig  # the tokenizer that all stages share; empty: that of the model or run to start from
    sources: dict[str, SourceConfig]  # data sources by name
    stages: dict[str, StageConfig]  # stages by name
    # evaluations by name; each runs after every stage
    evaluations: dict[str, EvaluationConfig] = dataclasses.field(default_factory=dict)
    # prompts that each stage continues greedily, to be read side by side; a bidirectional model fills in mask tokens
    samples: list[str] = dataclasses.field(default_factory=list)
    sample_tokens: int = 64  # max tokens of a sample
    # where metrics go besides metrics.jsonl and TensorBoard: wandb, or the import path of a tracker
    trackers: list[str] = dataclasses.field(default_factory=list)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)  # sharding of the model and the batch
    seed: int = 0  # seed of all random choices
    # end the run if a step, a read, a batch of an evaluation or a save takes longer than this many seconds; 0: never
    hang_seconds: float = 600.0
    # other limits in seconds, by kind: wait (for the other processes), load, compile (these three: an hour or
    # hang_seconds, whichever is longer), read, compute, evaluate, sample, save; 0: never
    hang_limits: dict[str, float] = dataclasses.field(default_factory=dict)
    check_memory: bool = True  # reject a stage whose step needs more memory than a device has
    cache_dir: str = ""  # directory of the cache; empty: $LLM3_CACHE_DIR, else $XDG_CACHE_HOME/llm3, else ~/.cache/llm3
    # directory of local copies of sources (see sources.*.local); empty: read each source from its path
    data_dir: str = ""

    def __post_init__(self) -> None:
        for name in ("classes", "adapters", "max_output_positions"):
            if getattr(self.model, name):
                raise UserError(f"config.model.{name}: expected it unset; it follows from the labels and the stage")
        at_least("hang_seconds", self.hang_seconds, 0)
        for kind, seconds in self.hang_limits.items():
            one_of("hang_limits", kind, HANG_KINDS)
            at_least(f"hang_limits.{kind}", seconds, 0)
        at_least("sample_tokens", self.sample_tokens, 1)
        for number, prompt in enumerate(self.samples):
            if not prompt:
                raise UserError(f"config.samples[{number}] is empty: expected a prompt")
        for section in ("sources", "stages", "evaluations"):
            for name in getattr(self, section):
                check_name(name, f"config.{section}")
        for name in RESERVED.intersection(self.stages):
            raise UserError(
                f"config.stages.{name}: cannot be a stage's name: the run directory has a file of that name"
            )
        for field in ("cache_dir", "data_dir"):
            if value := getattr(self, field):
                local_path(value, f"config.{field}")


def as_dict(config: Any) -> dict:
    """A config as values that JSON can hold."""
    return dataclasses.asdict(config)

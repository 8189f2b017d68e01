"""Every field of a run's config, with types and checks; `llm3.config.load` reads them.

This module does not import jax, so a misspelt field is reported before any device is used.
"""

import dataclasses
from typing import Any

from llm3.config.checks import check_optimizer, check_phases, check_warmup
from llm3.config.data_schema import SourceConfig, TokenizerConfig
from llm3.errors import UserError, at_least, one_of
from llm3.files import RESERVED, check_name, local_path

PROJECTIONS = ("query", "key", "value", "out", "gate", "up", "down")  # names of the kernels of a layer


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """A low-rank adapter on projections of every layer: y = x W + scale * (dropout(x) A) B."""

    rank: int = 8  # rank of the two low-rank factors
    alpha: float = 16.0  # the adapter's output is scaled by alpha / rank, or by alpha / sqrt(rank) with rslora
    rslora: bool = False  # scale by alpha / sqrt(rank) instead of alpha / rank
    dropout: float = 0.0  # dropout probability on the adapter's input, in training only
    dora: bool = False  # also train a magnitude for each column of the adapted kernel
    targets: tuple[str, ...] = PROJECTIONS  # the projections of each layer that get this adapter
    active: bool = True  # False: kept in the checkpoint, but not computed

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        at_least("adapters.*.rank", self.rank, 1)
        if not self.targets:
            raise UserError(f"config: adapters.*.targets is empty: expected some of {', '.join(PROJECTIONS)}")
        for target in self.targets:
            one_of("adapters.*.targets", target, PROJECTIONS)
        if not self.alpha > 0:
            raise UserError(f"config: adapters.*.alpha={self.alpha!r}: expected a number above 0")
        if not 0 <= self.dropout < 1:
            raise UserError(f"config: adapters.*.dropout={self.dropout!r}: expected a share from 0 up to 1, without 1")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The transformer. The run sets some of the fields; a config must not."""

    layers: int  # number of transformer layers
    d_model: int  # width of the hidden states
    heads: int  # number of attention heads
    d_ff: int  # width of the gated MLP's hidden layer
    kv_heads: int = 0  # number of key and value heads; 0: as many as heads
    head_dim: int = 0  # width of one head; 0: d_model // heads
    causal: bool = True  # True: a decoder; False: a bidirectional encoder
    norm: str = "rmsnorm"  # rmsnorm or layernorm
    norm_epsilon: float = 1e-6  # added to the variance before the square root
    qk_norm: bool = False  # normalize queries and keys, head by head
    attention_bias: bool = False  # add a bias to the attention projections
    tie_embeddings: bool = True  # the LM head shares the token embedding's weights
    logit_softcap: float = 0.0  # cap logits smoothly at this magnitude; 0: no cap
    rope_theta: float = 10_000.0  # base of the rotary position frequencies
    pool: str = "last"  # input of a task head: the last position of a document, or the mean over its positions
    remat: str = "none"  # recompute in the backward pass: none, full (everything), or dots (all but matmul results)
    scan_unroll: int = 1  # layers unrolled in each iteration of the layer scan
    logit_chunk: int = 0  # compute the LM loss over this many positions at a time, to save memory; 0: all at once
    compute_dtype: str = "auto"  # float32 (never TF32), bfloat16, or auto: bfloat16 on accelerators, float32 on CPUs
    vocab_size: int = 0  # set by the run: size of the tokenizer's vocabulary
    classes: int = 0  # set by the run: number of labels; 0: no task head
    adapters: Any = ()  # set by the run: the stage's adapters, ((name, AdapterConfig), ...)
    # set by the run: max positions per window whose output the loss uses; 0: unknown
    max_output_positions: int = 0

    def __post_init__(self) -> None:
        read = lambda each: AdapterConfig(**each) if isinstance(each, dict) else each  # noqa: E731
        object.__setattr__(self, "adapters", tuple((name, read(each)) for name, each in self.adapters))
        one_of("model.norm", self.norm, ("rmsnorm", "layernorm"))
        one_of("model.pool", self.pool, ("last", "mean"))
        one_of("model.remat", self.remat, ("none", "full", "dots"))
        one_of("model.compute_dtype", self.compute_dtype, ("auto", "float32", "bfloat16"))
        for name in ("layers", "d_model", "heads", "d_ff", "scan_unroll"):
            at_least(f"model.{name}", getattr(self, name), 1)
        if not self.kv_heads:
            object.__setattr__(self, "kv_heads", self.heads)
        if not self.head_dim:
            if self.d_model % self.heads:
                raise UserError(f"model.heads={self.heads} does not divide model.d_model={self.d_model}")
            object.__setattr__(self, "head_dim", self.d_model // self.heads)
        for name in ("kv_heads", "head_dim"):
            at_least(f"model.{name}", getattr(self, name), 1)
        if not self.norm_epsilon > 0:
            raise UserError(f"config: model.norm_epsilon={self.norm_epsilon}: expected a number above 0")
        if self.heads % self.kv_heads:
            raise UserError(f"model.kv_heads={self.kv_heads} does not divide model.heads={self.heads}")
        if self.head_dim % 2:
            raise UserError(f"model.head_dim={self.head_dim} is odd; rotary positions need an even one")
        for target in PROJECTIONS:
            here = [each for _, each in self.adapters if each.active and target in each.targets]
            if len(here) > 1 and any(each.dora for each in here):
                raise UserError(f"config: adapters: {len(here)} are active on {target!r}; expected only one with DoRA")
        if self.pool == "last" and not self.causal:
            raise UserError("model.pool='last' needs a causal model; a bidirectional one needs pool='mean'")


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
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # further arguments of the optax function

    def __post_init__(self) -> None:
        check_optimizer(vars(self), "config: optimizer.*")


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """When to skip a step besides a non-finite loss or gradient, and when to end the run.

    The window starts anew with each phase of `unfreeze` and each mixture of `data_schedule`.
    """

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

    kind: str  # pretrain, posttrain or finetune
    data: dict[str, float]  # the mixture: {source: weight}
    steps: int  # number of optimizer steps
    batch_size: int  # windows per step, over all devices
    sequence_length: int  # tokens per window
    weights: str = "tokens"  # unit of the weights of `data`: tokens or documents
    temperature: float = 0.0  # t > 0 multiplies each weight by (tokens of the source) ** (1 / t); 0: off
    # pairs [step, {source: weight}]: the mixture from that step on
    data_schedule: list[Any] = dataclasses.field(default_factory=list)
    replay: float = 0.0  # share of the mixture that repeats the parent's data, with the parent's weights
    start: Any = None  # the parent: a stage of this run, or dict(run=, stage=, step=, fresh=[...], drop=[...])
    objective: Any = "causal"  # a name, or dict(name=..., and its options)
    train: Any = "all"  # trainable parameters: a rule, or a list of rules
    # pairs [step, rule]: parameters that become trainable at that step
    unfreeze: list[Any] = dataclasses.field(default_factory=list)
    adapters: dict[str, AdapterConfig] = dataclasses.field(default_factory=dict)  # low-rank adapters by name
    frozen: str = "float32"  # how frozen parameters are stored: float32, compute (the compute dtype), int8 or nf4
    seed: int | None = None  # seed of the stage's data order and fresh parameters; None: from the run's seed
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)  # the optimizer of the stage
    guard: GuardConfig = dataclasses.field(default_factory=GuardConfig)  # when to skip a step or end the run
    micro_batches: int = 1  # split each batch into this many parts and add up their gradients
    log_every: int = 10  # steps between log lines
    save_every: int = 100  # steps between checkpoints
    keep: int = 2  # number of latest checkpoints to keep
    best: str = ""  # also keep the checkpoint that is best by this metric, e.g. domain_bits_per_byte
    baseline: bool = False  # report the stage separately from the main chain

    def __post_init__(self) -> None:
        one_of("stages.*.kind", self.kind, ("pretrain", "posttrain", "finetune"))
        one_of("stages.*.frozen", self.frozen, ("float32", "compute", "int8", "nf4"))
        for name in ("steps", "batch_size", "sequence_length", "micro_batches", "log_every", "save_every", "keep"):
            at_least(f"stages.*.{name}", getattr(self, name), 1)
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

    kind: str  # name of the evaluation plugin
    source: str  # the source it measures on
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


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A whole experiment."""

    model: ModelConfig  # the model that all stages share
    tokenizer: TokenizerConfig  # the tokenizer that all stages share
    sources: dict[str, SourceConfig]  # data sources by name
    stages: dict[str, StageConfig]  # stages by name
    # evaluations by name; each runs after every stage
    evaluations: dict[str, EvaluationConfig] = dataclasses.field(default_factory=dict)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)  # sharding of the model and the batch
    seed: int = 0  # seed of all random choices
    hang_seconds: float = 600.0  # end the run if a step, a read or a save takes longer than this many seconds; 0: never
    check_memory: bool = True  # reject a stage whose step needs more memory than a device has
    cache_dir: str = ""  # directory of the token cache; empty: inside the workdir
    # directory of local copies of sources (see sources.*.local); empty: read each source from its path
    data_dir: str = ""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "classes", "adapters", "max_output_positions"):
            if getattr(self.model, name):
                raise UserError(
                    f"config.model.{name}: expected it unset; it follows from the tokenizer, the labels and the stage"
                )
        at_least("hang_seconds", self.hang_seconds, 0)
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

"""Every knob of a run, typed, in one place; `llm3.config.load` reads them.

Nothing here imports jax, so that a misspelt field is found before any device is touched.
"""

import dataclasses
from typing import Any

from llm3.config.data_schema import SourceConfig, TokenizerConfig
from llm3.errors import UserError, at_least, one_of

PROJECTIONS = ("query", "key", "value", "out", "gate", "up", "down")  # the kernels of a layer, by name


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """A low-rank adapter beside projections of every layer: y = x W + scale (dropout(x) A) B. See `models/lora.py`."""

    rank: int = 8
    alpha: float = 16.0  # scale: alpha / rank ...
    rslora: bool = False  # ... or alpha / sqrt(rank)
    dropout: float = 0.0  # of the adapter's input, while it trains
    dora: bool = False  # with a trained magnitude of each column of the adapted kernel
    targets: tuple[str, ...] = PROJECTIONS
    active: bool = True  # False: it stays in the checkpoint beside the others, and is not computed

    def __post_init__(self):
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
    """One transformer family; the last fields, from `compute_dtype` on, are filled in by the run."""

    layers: int
    d_model: int
    heads: int
    d_ff: int
    kv_heads: int = 0  # 0: as many as heads
    head_dim: int = 0  # 0: d_model // heads
    causal: bool = True
    norm: str = "rmsnorm"
    norm_epsilon: float = 1e-6
    qk_norm: bool = False
    attention_bias: bool = False
    tie_embeddings: bool = True
    logit_softcap: float = 0.0  # 0: none
    rope_theta: float = 10_000.0
    pool: str = "last"
    remat: str = "none"
    scan_unroll: int = 1
    logit_chunk: int = 0  # positions of a window whose logits are held at a time, in a language model's loss; 0: all
    compute_dtype: str = "auto"
    vocab_size: int = 0
    classes: int = 0  # 0: no task head
    adapters: Any = ()  # ((name, AdapterConfig), ...), of the stage
    read_out: int = 0  # in how many places of a training window at most it is read; 0: not known

    def __post_init__(self):
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
                raise UserError(
                    f"config: adapters: {len(here)} are active on {target!r}, with DoRA there can be only one"
                )
        if self.pool == "last" and not self.causal:
            raise UserError("model.pool='last' needs a causal model; a bidirectional one takes pool='mean'")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1: the devices that are left. See `launch/README.md`."""

    data: int = -1  # copies of the parameters, each with its rows of the batch
    fsdp: int = 1  # pieces of the parameters, gathered for use, each with its rows of the batch
    context: int = 1  # pieces of each window
    tensor: int = 1  # pieces of the heads, the hidden layers and the vocabulary
    across: str = ""  # the axis that is laid over hosts (or TPU slices), so that only it crosses the slow network
    rules: dict[str, Any] = dataclasses.field(default_factory=dict)  # {logical axis: mesh axis, list of them, or None}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer by name, its schedule, and what it is not applied to. `options` go to the optax function as is."""

    name: str = "adamw"
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup_steps: int = 0
    decay_steps: int = 0  # wsd only: the steps of the final decay; 0: a tenth of all
    final_fraction: float = 0.1  # of the peak learning rate, at the last step
    weight_decay: float = 0.1
    clip_norm: float = 1.0  # 0: none
    layer_decay: float = 1.0  # of the learning rate, for each layer further from the top; 1: none
    learning_rates: list[Any] = dataclasses.field(default_factory=list)  # [rule, factor of the rate], first match wins
    l2_sp: float = 0.0  # strength of the pull toward the parent's weights; 0: none
    ema: float = 0.0  # decay of a running mean of the weights, which is then the stage's result; 0: none
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """Which steps are left out, besides those whose loss or gradient is not finite, and when a stage gives up."""

    deviations: float = 0.0  # a loss or gradient norm so many standard deviations above the window's mean; 0: any
    window: int = 128  # the last losses and gradient norms of steps that were not left out
    stop_after: int = 10  # steps left out in a row, after which the stage ends with an error

    def __post_init__(self):
        at_least("guard.*.deviations", self.deviations, 0)
        at_least("guard.*.window", self.window, 2)
        at_least("guard.*.stop_after", self.stop_after, 1)


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stage: a parent, a data mixture, an objective, a rule for what trains, an optimizer."""

    kind: str
    data: dict[str, float]  # source -> weight: its share of what is drawn ...
    steps: int
    batch_size: int  # windows a step, over all devices
    sequence_length: int
    weights: str = "tokens"  # ... of the tokens, or of the documents
    temperature: float = 0.0  # t > 0: a weight is multiplied by (tokens of the source) ** (1 / t)
    data_schedule: list[Any] = dataclasses.field(default_factory=list)  # [step, {source: weight}]: from that step on
    replay: float = 0.0  # the share of what is drawn that is the parent's data, by the parent's weights
    start: Any = None  # a stage of this run, or dict(run=, stage=, step=, fresh=[...], drop=[...])
    objective: Any = "causal"  # a name, or dict(name=..., and its options)
    train: Any = "all"  # a rule, or a list of them
    unfreeze: list[Any] = dataclasses.field(default_factory=list)  # [step, rule]: what trains as well from that step on
    adapters: dict[str, AdapterConfig] = dataclasses.field(default_factory=dict)
    frozen: str = "float32"  # how what is frozen is stored: float32, compute (its dtype), int8 or nf4
    seed: int | None = None  # of this stage's data order and fresh leaves; None: the run's
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    guard: GuardConfig = dataclasses.field(default_factory=GuardConfig)
    micro_batches: int = 1
    log_every: int = 10
    save_every: int = 100
    keep: int = 2  # the latest checkpoints that are kept ...
    best: str = ""  # ... and the best by this figure, as in "domain_bits_per_byte", measured at every save
    baseline: bool = False  # reported beside the main chain, not in it

    def __post_init__(self):
        one_of("stages.*.kind", self.kind, ("pretrain", "posttrain", "finetune"))
        one_of("stages.*.frozen", self.frozen, ("float32", "compute", "int8", "nf4"))
        for name in ("steps", "batch_size", "sequence_length", "micro_batches", "log_every", "save_every", "keep"):
            at_least(f"stages.*.{name}", getattr(self, name), 1)
        if not self.data:
            raise UserError("config: stages.*.data is empty: expected {source: weight}")
        for source, weight in self.data.items():
            if not weight > 0:
                raise UserError(f"config: stages.*.data.{source}={weight!r}: expected a weight above 0")
        one_of("stages.*.weights", self.weights, ("tokens", "documents"))
        at_least("stages.*.temperature", self.temperature, 0)
        if not 0 <= self.replay < 1:
            raise UserError(f"config: stages.*.replay={self.replay!r}: expected a share from 0 up to, not including, 1")
        if not isinstance(self.objective_name, str):
            raise UserError(f"config: stages.*.objective={self.objective!r}: expected a name, or dict(name=, options)")

    @property
    def objective_name(self) -> str:
        """Which objective it is."""
        return self.objective.get("name") if isinstance(self.objective, dict) else self.objective

    @property
    def objective_options(self) -> dict[str, Any]:
        """The options of the objective that the config sets."""
        return {k: v for k, v in self.objective.items() if k != "name"} if isinstance(self.objective, dict) else {}


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """One evaluation, run after init and after each stage."""

    kind: str
    source: str
    split: str = "validation"
    sequence_length: int = 256
    batch_size: int = 16
    max_documents: int = 0  # a fixed pseudo-random sample of the split; 0: all
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # those that its kind has

    def __post_init__(self):
        one_of("evaluations.*.split", self.split, ("train", "validation", "test"))
        for name in ("sequence_length", "batch_size"):
            at_least(f"evaluations.*.{name}", getattr(self, name), 1)
        at_least("evaluations.*.max_documents", self.max_documents, 0)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A whole experiment."""

    model: ModelConfig
    tokenizer: TokenizerConfig
    sources: dict[str, SourceConfig]
    stages: dict[str, StageConfig]
    evaluations: dict[str, EvaluationConfig] = dataclasses.field(default_factory=dict)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    seed: int = 0
    hang_seconds: float = 600.0  # a step, a read of data or a save that takes longer ends the run; 0: none does
    cache_dir: str = ""  # "": inside the workdir
    data_dir: str = ""  # where the local copies of sources lie; "": sources are read from their `path`

    def __post_init__(self):
        for name in ("vocab_size", "classes", "adapters", "read_out"):
            if getattr(self.model, name):
                raise UserError(
                    f"config.model.{name}: not to be set; it follows from the tokenizer, the labels and the stage"
                )
        at_least("hang_seconds", self.hang_seconds, 0)


def as_dict(config: Any) -> dict:
    """A config as plain, JSON-able values."""
    return dataclasses.asdict(config)

"""Every knob of a run, typed, in one place; and the reading of config files and command-line overrides.

A config file is Python: `get_config()` returns an `ml_collections.ConfigDict` whose fields are those of `RunConfig`.
Nothing here imports jax, so that a misspelt field is found before any device is touched.
"""

import ast
import dataclasses
import re
import runpy
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llm3.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One transformer family; `vocab_size`, `classes` and `compute_dtype` are filled in by the run."""

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
    compute_dtype: str = "auto"
    vocab_size: int = 0
    classes: int = 0  # 0: no task head

    def __post_init__(self):
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
        if self.heads % self.kv_heads:
            raise UserError(f"model.kv_heads={self.kv_heads} does not divide model.heads={self.heads}")
        if self.head_dim % 2:
            raise UserError(f"model.head_dim={self.head_dim} is odd; rotary positions need an even one")
        if self.pool == "last" and not self.causal:
            raise UserError("model.pool='last' needs a causal model; a bidirectional one takes pool='mean'")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1: the devices that are left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """A byte-level BPE trained on the train splits of `sources`, or an existing tokenizer.json at `path`."""

    vocab_size: int = 4096
    sources: list[str] = dataclasses.field(default_factory=list)  # empty: those of the pretrain stages
    path: str = ""


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """Where text comes from: `path` and the rest as `datasets.load_dataset` takes them, or a `builtin:` corpus."""

    path: str
    name: str | None = None
    data_files: Any = None  # str, list of str, or {split: str or list of str}
    data_dir: str | None = None
    text: str = "text"
    label: str = ""
    train: str = "train"  # the split of the dataset that is used for training ...
    validation: str = "validation"  # ... and for validation; if empty, `validation_share` of train is held out
    validation_share: float = 0.0
    max_documents: int = 0  # of the train split, a fixed pseudo-random sample; 0: all


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
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stage: a parent, a data mixture, an objective, a rule for what trains, an optimizer."""

    kind: str
    data: dict[str, float]  # source -> weight
    steps: int
    batch_size: int  # windows a step, over all devices
    sequence_length: int
    start: Any = None  # a stage of this run, or dict(run=, stage=, step=, fresh=[...], drop=[...])
    objective: str = "causal"
    train: Any = "all"  # a rule, or a list of them
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    micro_batches: int = 1
    log_every: int = 10
    save_every: int = 100
    keep: int = 2  # the latest checkpoints that are kept ...
    best: str = ""  # ... and the best by this figure, as in "domain_bits_per_byte", measured at every save
    baseline: bool = False  # reported beside the main chain, not in it

    def __post_init__(self):
        one_of("stages.*.kind", self.kind, ("pretrain", "posttrain", "finetune"))
        for name in ("steps", "batch_size", "sequence_length", "micro_batches", "log_every", "save_every", "keep"):
            at_least(f"stages.*.{name}", getattr(self, name), 1)
        if not self.data:
            raise UserError("config: stages.*.data is empty: expected {source: weight}")
        for source, weight in self.data.items():
            if not weight > 0:
                raise UserError(f"config: stages.*.data.{source}={weight!r}: expected a weight above 0")


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """One evaluation, run after init and after each stage."""

    kind: str
    source: str
    split: str = "validation"
    sequence_length: int = 256
    batch_size: int = 16
    max_documents: int = 0  # a fixed pseudo-random sample of the split; 0: all

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
    cache_dir: str = ""  # "": inside the workdir


def one_of(field: str, value: Any, options: Iterable[Any]) -> None:
    """Raise a UserError unless `value` is one of `options`."""
    if value not in (options := tuple(options)):
        raise UserError(f"config: {field}={value!r}: {nearest(value, options)}")


def at_least(field: str, value: float, least: float) -> None:
    """Raise a UserError unless `value` is at least `least`."""
    if value < least:
        raise UserError(f"config: {field}={value!r}: expected at least {least}")


def load(file: str, overrides: Iterable[str] = ()) -> RunConfig:
    """The config of `file` ("path.py" or "path.py:argument"), with overrides of the form "stages.finetune.steps=50".

    Raises UserError for a file that does not load, an unknown field (with the nearest right names), a missing one, or
    a wrong type.
    """
    values = _run_file(file)
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"--config.{override}: expected --config.FIELD=VALUE")
        _assign(RunConfig, values, name.split("."), _literal(text), "config")
    return _read(RunConfig, values, "config")


def as_dict(config: Any) -> dict:
    """A config as plain, JSON-able values."""
    return dataclasses.asdict(config)


def _run_file(file: str) -> dict:
    name, _, argument = file.partition(":")
    path = Path(name)
    if not path.is_file():
        siblings = sorted(str(each) for each in path.parent.glob("*.py")) if path.parent.is_dir() else []
        raise UserError(f"--config={name}: no such file; {nearest(name, siblings)}")
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
        config = get_config and (get_config(argument) if argument else get_config())
    except Exception as error:
        raise UserError(f"--config={name}: {type(error).__name__}: {error}") from error
    if get_config is None:
        raise UserError(f"--config={name}: it defines no get_config()")
    if not hasattr(config, "to_dict"):
        raise UserError(f"--config={name}: get_config() gave {type(config).__name__}, expected a ConfigDict")
    return _copied(config.to_dict())


def _copied(value: Any) -> Any:
    """Plain values of which no two places share an object, so that an override changes one place only."""
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    return [_copied(each) for each in value] if isinstance(value, list | tuple) else value


def _literal(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        return text


def _assign(kind: Any, values: dict, parts: list[str], value: Any, where: str) -> None:
    """Set one field by its dotted name; the schema `kind` says which names there are."""
    name, rest = parts[0], parts[1:]
    if dataclasses.is_dataclass(kind):
        fields = typing.get_type_hints(kind)
        if name not in fields:
            raise UserError(f"{where}.{name}: no such field; {nearest(name, fields)}")
        inner = fields[name]
    else:
        inner = typing.get_args(kind)[1] if typing.get_origin(kind) is dict else Any
        if dataclasses.is_dataclass(inner) and name not in values:
            raise UserError(f"{where}.{name}: no such entry; {nearest(name, values)}")
    if not rest:
        values[name] = value
        return
    if not isinstance(values.setdefault(name, {}), dict):
        raise UserError(f"{where}.{name} is {values[name]!r} and has no field {rest[0]!r}")
    _assign(inner, values[name], rest, value, f"{where}.{name}")


def _read(kind: Any, value: Any, where: str) -> Any:
    """`value` as a `kind`: a dataclass, dict[str, X], list[X], a union or a plain type. Raises UserError."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _read_section(kind, value, where)
    if origin in (types.UnionType, typing.Union):
        options = [each for each in args if each is not types.NoneType]
        return None if value is None else _read(options[0], value, where)
    if origin is dict and isinstance(value, dict):
        return {key: _read(args[1], each, f"{where}.{key}") for key, each in value.items()}
    if origin is list and isinstance(value, list | tuple):
        return [_read(args[0], each, f"{where}[{i}]") for i, each in enumerate(value)]
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind in (int, str, bool) and type(value) is kind:
        return value
    expected = getattr(kind, "__name__", str(kind)) if origin is None else str(kind)
    raise UserError(f"{where}={value!r}: expected {expected}, got {type(value).__name__}")


def _read_section(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"{where}={value!r}: expected a section with fields, got {type(value).__name__}")
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in value:
        if name not in fields:
            raise UserError(f"{where}.{name}: no such field; {nearest(name, fields)}")
    missing = [
        name
        for name, field in fields.items()
        if name not in value and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"{where}: missing {', '.join(missing)}")
    read = {name: _read(hints[name], each, f"{where}.{name}") for name, each in value.items()}
    try:
        return kind(**read)
    except UserError as error:
        raise UserError(re.sub(r"config: \w+\.\*", where, str(error))) from None

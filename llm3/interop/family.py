"""Which family a model belongs to: by config.json when it is read, by its options when it is written."""

import dataclasses
from types import ModuleType
from typing import Any

from llm3.config.model_schema import ModelConfig
from llm3.errors import UserError, nearest
from llm3.interop import families
from llm3.interop.config_json import Json, is_close
from llm3.registry import load_plugin, plugin_names

# fields of a ModelConfig that say how it is computed or trained, not what it computes
FREE = (
    "remat",
    "scan_unroll",
    "vocab_block",
    "compute_dtype",
    "matmul",
    "vocab_multiple",
    "pool",
    "pooler",
    "classes",
    "adapters",
    "max_output_positions",
)
PREFERRED = ("llama", "qwen3")  # for models of llm3's own: the families most programs read
_LINEAR = "it has layers of linear attention"
_PER_LAYER = "it has inputs of their own for each layer"
_EXPERTS = "it is a mixture of experts"
_VISION = "it is a text model inside a model of images"
_BOTH = "it has an encoder and a decoder"
REASONS = {
    "qwen3_5": _LINEAR,
    "qwen3_5_text": _LINEAR,
    "qwen3_5_moe": _LINEAR,
    "qwen3_next": _LINEAR,
    "olmo_hybrid": _LINEAR,
    "mamba": "it is a state space model",
    "mamba2": "it is a state space model",
    "gemma4": _PER_LAYER,
    "gemma4_text": _PER_LAYER,
    "gemma3n": _PER_LAYER,
    "gemma3n_text": _PER_LAYER,
    "gpt_oss": "its attention has sinks, and it is a mixture of experts",
    "qwen2_moe": _EXPERTS,
    "qwen3_moe": _EXPERTS,
    "mixtral": _EXPERTS,
    "olmoe": _EXPERTS,
    "deepseek_v2": _EXPERTS,
    "deepseek_v3": _EXPERTS,
    "llama4": _EXPERTS,
    "llama4_text": _EXPERTS,
    "gemma3": f"{_VISION}: expected model_type 'gemma3_text'",
    "mistral3": _VISION,
    "ministral3": "its rotary positions are scaled by yarn",
    "t5": _BOTH,
    "bart": _BOTH,
    "modernbert-decoder": "its windows are those of an encoder",
    "deberta-v2": "its attention has positions relative to each query",
}


def model_types() -> dict[str, str]:
    """{model_type in config.json: name of the family}."""
    return {kind: name for name in plugin_names(families) for kind in load_plugin(families, name).MODEL_TYPES}


def load_family(name: str) -> ModuleType:
    """The plugin of a family. Raises UserError with the nearest names."""
    return load_plugin(families, name)


def family_of_json(config: Json) -> str:
    """The family of a config.json. Raises UserError for one that llm3 does not know, with the reason if it has one."""
    known, kind = model_types(), config.get("model_type")
    if (method := (config.get("quantization_config") or {}).get("quant_method")) is not None:
        raise UserError(f"config.json: its weights are quantized by {method!r}; expected float32, float16 or bfloat16")
    if kind is None:
        raise UserError("config.json has no 'model_type'; expected a folder as transformers' save_pretrained writes")
    if kind in known:
        return known[kind]
    if kind in REASONS:
        raise UserError(f"model_type {kind!r} cannot be read: {REASONS[kind]}; valid: {', '.join(sorted(known))}")
    raise UserError(f"model_type {kind!r} is not one that llm3 can read; {nearest(str(kind), known)}")


def family_of_model(model: ModelConfig, family: str | None = None) -> str:
    """The family to write a model as. family: the one it was read as; None: the first that can express it.

    Raises UserError that names the fields which no family, or this one, can express.
    """
    if family is not None:
        if lost := not_expressed(model, family):
            raise UserError(_complaint(lost, f"transformers' {family}, which the model came from"))
        return family
    names = [*PREFERRED, *(name for name in plugin_names(families) if name not in PREFERRED)]
    fewest: tuple[str, dict[str, Any]] | None = None
    for name in names:
        lost = not_expressed(model, name)
        if not lost:
            return name
        if fewest is None or len(lost) < len(fewest[1]):
            fewest = name, lost
    assert fewest is not None, "there are families"
    nearest_family, lost = fewest
    raise UserError(_complaint(lost, f"any family that llm3 writes; the nearest is transformers' {nearest_family}"))


def not_expressed(model: ModelConfig, family: str) -> dict[str, Any]:
    """{field: value} of what a model has and this family's config.json cannot say."""
    plugin = load_family(family)
    try:
        again = ModelConfig(**plugin.read_config(plugin.write_config(model)))
    except UserError as error:
        return {str(error).partition("=")[0].removeprefix("config: ").removeprefix("model."): error}
    names = [each.name for each in dataclasses.fields(ModelConfig) if each.name not in FREE]
    return {name: getattr(model, name) for name in names if not is_close(getattr(again, name), getattr(model, name))}


def _complaint(lost: dict[str, Any], where: str) -> str:
    for value in lost.values():
        if isinstance(value, UserError):
            return str(value)
    return ", ".join(f"model.{name}={value!r}" for name, value in lost.items()) + f" has no counterpart in {where}"

"""Qwen3 (2025): Llama with a norm of each head's queries and keys."""

from typing import Any

from llm3.config.model_schema import ModelConfig
from llm3.interop import llama_like
from llm3.interop.config_json import Fields, Json, layer_types, write_rope
from llm3.interop.families import qwen2

MODEL_TYPES = ("qwen3",)
LM, CLASSIFIER = "Qwen3ForCausalLM", "Qwen3ForSequenceClassification"
BASE = "model."
TABLE = llama_like.TABLE
LEFT_OVER = llama_like.LEFT_OVER


def read_config(json: Json) -> Fields:
    """The fields of a ModelConfig."""
    json = llama_like.DEFAULTS | {"head_dim": 128} | qwen2.WINDOWS | json
    return llama_like.read(json) | qwen2.read_windows(json) | {"qk_norm": "head"}


def write_config(model: ModelConfig) -> dict[str, Any]:
    """The keys of config.json."""
    written = llama_like.write(model) | write_rope(model) | {"attention_bias": model.attention_bias == "all"}
    return written | {"layer_types": layer_types(model)} | qwen2.write_windows(model)

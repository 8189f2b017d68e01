"""Mistral (Jiang et al. 2023): Llama, in the first version with a sliding window in every layer."""

from typing import Any

from llm3.config.model_schema import ModelConfig
from llm3.interop import llama_like
from llm3.interop.config_json import SLIDING, Fields, Json, expect, windows, write_rope

MODEL_TYPES = ("mistral",)
LM, CLASSIFIER = "MistralForCausalLM", "MistralForSequenceClassification"
BASE = "model."
TABLE = llama_like.TABLE
LEFT_OVER = llama_like.LEFT_OVER


def read_config(json: Json) -> Fields:
    """The fields of a ModelConfig."""
    json = llama_like.DEFAULTS | {"sliding_window": 4096, "num_key_value_heads": 8} | json
    expect(json, attention_bias=False, mlp_bias=False, layer_types=[SLIDING] * json["num_hidden_layers"])
    return llama_like.read(json) | windows([SLIDING], json["sliding_window"])


def write_config(model: ModelConfig) -> dict[str, Any]:
    """The keys of config.json."""
    return llama_like.write(model) | write_rope(model) | {"sliding_window": model.window or None}

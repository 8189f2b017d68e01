"""OLMo 2 (OLMo Team 2025): norms after each part, queries and keys normalized over all heads together."""

from typing import Any

from llm3.config.model_schema import ModelConfig
from llm3.interop import llama_like
from llm3.interop.config_json import Fields, Json, expect, write_rope
from llm3.interop.table import Table

MODEL_TYPES = ("olmo2",)
LM, CLASSIFIER = "Olmo2ForCausalLM", "Olmo2ForSequenceClassification"
BASE = "model."
AFTER = {
    "layers/attention_norm": "model.layers.{i}.post_attention_layernorm",
    "layers/mlp_norm": "model.layers.{i}.post_feedforward_layernorm",
}
TABLE: Table = {**llama_like.TABLE, **AFTER}
LEFT_OVER = llama_like.LEFT_OVER
DEFAULTS: Json = llama_like.DEFAULTS | {"rms_norm_eps": 1e-5}


def read_config(json: Json) -> Fields:
    """The fields of a ModelConfig."""
    json = DEFAULTS | json
    expect(json, mlp_bias=False)
    return llama_like.read(json) | {"block": "after", "qk_norm": "projection"}


def write_config(model: ModelConfig) -> dict[str, Any]:
    """The keys of config.json."""
    return llama_like.write(model) | write_rope(model) | {"attention_bias": model.attention_bias == "all"}

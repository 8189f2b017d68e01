"""Llama (Touvron et al. 2023; Grattafiori et al. 2024), and models with its layout, such as SmolLM2."""

from typing import Any

from llm3.config.model_schema import ModelConfig
from llm3.interop import llama_like
from llm3.interop.config_json import Fields, Json, heads_divide, write_rope

MODEL_TYPES = ("llama",)
LM, CLASSIFIER = "LlamaForCausalLM", "LlamaForSequenceClassification"
BASE = "model."
TABLE = llama_like.TABLE
LEFT_OVER = llama_like.LEFT_OVER


def read_config(json: Json) -> Fields:
    """The fields of a ModelConfig."""
    return llama_like.read(llama_like.DEFAULTS | json)


def write_config(model: ModelConfig) -> dict[str, Any]:
    """The keys of config.json. Raises UserError for heads that do not divide the width."""
    heads_divide(model, "Llama")
    biases = {"attention_bias": model.attention_bias == "all", "mlp_bias": model.mlp_bias}
    return llama_like.write(model) | write_rope(model) | biases

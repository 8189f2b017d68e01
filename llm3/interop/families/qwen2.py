"""Qwen2 and Qwen2.5 (Yang et al. 2024): Llama with biases on queries, keys and values."""

from typing import Any

from llm3.config.model_schema import ModelConfig
from llm3.interop import llama_like
from llm3.interop.config_json import FULL, SLIDING, Fields, Json, layer_types, windows, write_rope

MODEL_TYPES = ("qwen2",)
LM, CLASSIFIER = "Qwen2ForCausalLM", "Qwen2ForSequenceClassification"
BASE = "model."
TABLE = llama_like.TABLE
LEFT_OVER = llama_like.LEFT_OVER
WINDOWS: Json = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}


def read_config(json: Json) -> Fields:
    """The fields of a ModelConfig."""
    json = llama_like.DEFAULTS | WINDOWS | json
    return llama_like.read(json) | read_windows(json) | {"attention_bias": "qkv"}


def write_config(model: ModelConfig) -> dict[str, Any]:
    """The keys of config.json."""
    return llama_like.write(model) | write_rope(model) | write_windows(model) | {"layer_types": layer_types(model)}


def read_windows(json: Json) -> Fields:
    """Sliding windows; without layer_types, those of the layers from max_window_layers on."""
    if not json["use_sliding_window"]:
        return windows([], None)
    first, layers = json["max_window_layers"], json["num_hidden_layers"]
    types = json.get("layer_types") or [SLIDING if layer >= first else FULL for layer in range(layers)]
    return windows(types, json["sliding_window"])


def write_windows(model: ModelConfig) -> dict[str, Any]:
    """The keys of `WINDOWS`, for files with layer_types."""
    return {"use_sliding_window": model.window > 0, "sliding_window": model.window or None, "max_window_layers": 0}

"""Gemma 3 (Gemma Team 2025), text only: Gemma 2 with QK-norm, and another theta in the layers with a window."""

from typing import Any

from llm3.config.model_schema import ModelConfig
from llm3.interop.config_json import FULL, SLIDING, Fields, Json, rope, windows, write_rope_by_type
from llm3.interop.families import gemma2

MODEL_TYPES = ("gemma3_text",)
LM, CLASSIFIER = "Gemma3ForCausalLM", "Gemma3TextForSequenceClassification"
BASE = "model."
TABLE = gemma2.TABLE
LEFT_OVER = (*gemma2.LEFT_OVER, r"model\.rotary_emb(_local)?\.\w*inv_freq")
DEFAULTS: Json = gemma2.DEFAULTS | {
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "sliding_window_pattern": 6,
}


def read_config(json: Json) -> Fields:
    """The fields of a ModelConfig. Without layer_types, every sixth layer has no window."""
    json = DEFAULTS | json
    layers, every = range(json["num_hidden_layers"]), json["sliding_window_pattern"]
    types = json.get("layer_types") or [SLIDING if (layer + 1) % every else FULL for layer in layers]
    fields = gemma2.read_gemma(json) | rope(json, window_key="rope_local_base_freq")
    fields |= windows(types, json["sliding_window"]) | {"qk_norm": "head"}
    return fields if fields["window"] else fields | {"window_rope_theta": 0.0}


def write_config(model: ModelConfig) -> dict[str, Any]:
    """The keys of config.json. Raises UserError for heads that do not divide the width."""
    return gemma2.write_gemma(model) | write_rope_by_type(model)

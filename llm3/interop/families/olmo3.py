"""OLMo 3 (OLMo Team 2025): OLMo 2 with sliding windows in three of four layers."""

from typing import Any

from llm3.config.model_schema import ModelConfig
from llm3.interop import llama_like
from llm3.interop.config_json import FULL, SLIDING, Fields, Json, layer_types, rope, windows, write_rope_by_type
from llm3.interop.families import olmo2

MODEL_TYPES = ("olmo3",)
LM, CLASSIFIER = "Olmo3ForCausalLM", "Olmo3ForSequenceClassification"
BASE = "model."
TABLE = olmo2.TABLE
LEFT_OVER = llama_like.LEFT_OVER
DEFAULTS: Json = olmo2.DEFAULTS | {"rope_theta": 500_000.0, "sliding_window": 4096}


def read_config(json: Json) -> Fields:
    """The fields of a ModelConfig. In older files, rope_scaling is that of the layers without a window."""
    json = DEFAULTS | json
    types = json.get("layer_types") or [
        SLIDING if (layer + 1) % 4 else FULL for layer in range(json["num_hidden_layers"])
    ]
    fields = olmo2.read_config(json) | rope(json, window_key="rope_theta") | windows(types, json["sliding_window"])
    return fields if fields["window"] else fields | {"window_rope_theta": 0.0}


def write_config(model: ModelConfig) -> dict[str, Any]:
    """The keys of config.json."""
    window = {"sliding_window": model.window or None, "layer_types": layer_types(model)}
    return olmo2.write_config(model) | write_rope_by_type(model) | window

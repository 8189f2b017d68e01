"""SmolLM3 (Bakouch et al. 2025): Llama without rotary positions in every fourth layer."""

from typing import Any

from llm3.config.model_schema import ModelConfig
from llm3.interop import llama_like
from llm3.interop.config_json import FULL, SLIDING, Fields, Json, layer_types, windows, write_rope

MODEL_TYPES = ("smollm3",)
LM, CLASSIFIER = "SmolLM3ForCausalLM", "SmolLM3ForSequenceClassification"
BASE = "model."
TABLE = llama_like.TABLE
LEFT_OVER = llama_like.LEFT_OVER
DEFAULTS: Json = {
    "rope_theta": 2_000_000.0,
    "tie_word_embeddings": True,
    "num_key_value_heads": 4,
    "no_rope_layer_interval": 4,
}


def read_config(json: Json) -> Fields:
    """The fields of a ModelConfig. In the file, no_rope_layers is 1 for each layer with rotary positions."""
    json = llama_like.DEFAULTS | DEFAULTS | json
    layers = range(json["num_hidden_layers"])
    every = json["no_rope_layer_interval"]
    rotary = json.get("no_rope_layers") or [int((layer + 1) % every != 0) for layer in layers]
    types = json.get("layer_types") or [FULL if rotary[layer] else SLIDING for layer in layers]
    window = json.get("sliding_window") if json.get("use_sliding_window") else None
    no_rope = tuple(layer for layer in layers if not rotary[layer])
    return llama_like.read(json) | windows(types, window) | {"no_rope_layers": no_rope}


def write_config(model: ModelConfig) -> dict[str, Any]:
    """The keys of config.json."""
    return (
        llama_like.write(model)
        | write_rope(model)
        | {
            "attention_bias": model.attention_bias == "all",
            "mlp_bias": model.mlp_bias,
            "no_rope_layers": [int(layer not in model.no_rope_layers) for layer in range(model.layers)],
            "use_sliding_window": model.window > 0,
            "sliding_window": model.window or None,
            "layer_types": layer_types(model),
        }
    )

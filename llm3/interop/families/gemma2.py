"""Gemma 2 (Gemma Team 2024): norms before and after each part, soft-caps, a window in every second layer.

The files hold the scale of a norm minus 1, as llm3 does with norm_unit_offset.
"""

import math
from typing import Any

from llm3.config.model_schema import ModelConfig
from llm3.interop import llama_like
from llm3.interop.config_json import (
    FULL,
    SLIDING,
    Fields,
    Json,
    activation,
    expect,
    heads_divide,
    layer_types,
    windows,
    write_activation,
    write_rope,
)
from llm3.interop.table import Table

MODEL_TYPES = ("gemma2",)
LM, CLASSIFIER = "Gemma2ForCausalLM", "Gemma2ForSequenceClassification"
BASE = "model."
SANDWICH = {
    "layers/attention_norm": "model.layers.{i}.input_layernorm",
    "layers/attention_out_norm": "model.layers.{i}.post_attention_layernorm",
    "layers/mlp_norm": "model.layers.{i}.pre_feedforward_layernorm",
    "layers/mlp_out_norm": "model.layers.{i}.post_feedforward_layernorm",
}
TABLE: Table = llama_like.ATTENTION | llama_like.MLP | SANDWICH | llama_like.OUTSIDE
LEFT_OVER = llama_like.LEFT_OVER
DEFAULTS: Json = llama_like.DEFAULTS | {
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 256,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
CAPS: Json = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}


def read_config(json: Json) -> Fields:
    """The fields of a ModelConfig."""
    json = DEFAULTS | CAPS | json
    layers = range(json["num_hidden_layers"])
    types = json.get("layer_types") or [FULL if layer % 2 else SLIDING for layer in layers]
    return read_gemma(json) | windows(types, json["sliding_window"])


def write_config(model: ModelConfig) -> dict[str, Any]:
    """The keys of config.json. Raises UserError for heads that do not divide the width."""
    return write_gemma(model) | write_rope(model)


def read_gemma(json: Json) -> Fields:
    """What Gemma 2 and 3 share, without windows."""
    expect(json, use_bidirectional_attention=False, mlp_bias=False)
    fields = llama_like.read(json)
    scale = json["query_pre_attn_scalar"] ** -0.5
    return fields | {
        "block": "sandwich",
        "norm_unit_offset": True,
        "activation": activation(json.get("hidden_activation") or "gelu_pytorch_tanh"),
        "embedding_scale": math.sqrt(fields["d_model"]),
        "attention_scale": 0.0 if math.isclose(scale, fields["head_dim"] ** -0.5) else scale,
        "attention_softcap": float(json.get("attn_logit_softcapping") or 0),
        "logit_softcap": float(json.get("final_logit_softcapping") or 0),
    }


def write_gemma(model: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_gemma`, with windows, without rope_parameters."""
    heads_divide(model, "Gemma")
    written = llama_like.write(model)
    written["hidden_activation"] = write_activation(model)
    del written["hidden_act"]
    return written | {
        "attention_bias": model.attention_bias == "all",
        "query_pre_attn_scalar": round(model.score_scale**-2),
        "attn_logit_softcapping": model.attention_softcap or None,
        "final_logit_softcapping": model.logit_softcap or None,
        "sliding_window": model.window or None,
        "layer_types": layer_types(model),
    }

"""Phi-1, Phi-1.5 and Phi-2 (Gunasekar et al. 2023): attention and MLP side by side after one LayerNorm."""

from typing import Any

from llm3.config.model_schema import ModelConfig
from llm3.interop import llama_like
from llm3.interop.config_json import (
    Fields,
    Json,
    activation,
    expect,
    rope,
    sizes,
    tidy,
    write_activation,
    write_rope,
    write_sizes,
)
from llm3.interop.table import Table

MODEL_TYPES = ("phi",)
LM, CLASSIFIER = "PhiForCausalLM", "PhiForSequenceClassification"
BASE = "model."
TABLE: Table = {
    **llama_like.ATTENTION,
    **llama_like.OUTSIDE,
    "layers/attention/out": "model.layers.{i}.self_attn.dense",
    "layers/attention_norm": "model.layers.{i}.input_layernorm",
    "layers/mlp/up": "model.layers.{i}.mlp.fc1",
    "layers/mlp/down": "model.layers.{i}.mlp.fc2",
    "final_norm": "model.final_layernorm",
}
LEFT_OVER = llama_like.LEFT_OVER
DEFAULTS: Json = {
    "hidden_act": "gelu_new",
    "layer_norm_eps": 1e-5,
    "partial_rotary_factor": 0.5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}


def read_config(json: Json) -> Fields:
    """The fields of a ModelConfig."""
    json = DEFAULTS | json
    expect(json, qk_layernorm=False)
    return (
        sizes(json)
        | rope(json, fraction_key="partial_rotary_factor")
        | {
            "block": "parallel_one_norm",
            "norm": "layernorm",
            "norm_epsilon": tidy(json["layer_norm_eps"]),
            "activation": activation(json["hidden_act"]),
            "gated_mlp": False,
            "attention_bias": "all",
            "mlp_bias": True,
            "lm_head_bias": True,
        }
    )


def write_config(model: ModelConfig) -> dict[str, Any]:
    """The keys of config.json."""
    written = write_sizes(model) | write_rope(model)
    written["rope_parameters"]["partial_rotary_factor"] = model.rope_fraction
    return written | {"hidden_act": write_activation(model, "gelu_new"), "layer_norm_eps": model.norm_epsilon}

"""The leaves and keys that the families after Llama share."""

from typing import Any

from llm3.config.model_schema import ModelConfig
from llm3.interop.config_json import Fields, Json, activation, rope, sizes, tidy, write_activation, write_sizes
from llm3.interop.table import Table

ATTENTION = {
    "layers/attention/query": "model.layers.{i}.self_attn.q_proj",
    "layers/attention/key": "model.layers.{i}.self_attn.k_proj",
    "layers/attention/value": "model.layers.{i}.self_attn.v_proj",
    "layers/attention/out": "model.layers.{i}.self_attn.o_proj",
    "layers/attention/query_norm": "model.layers.{i}.self_attn.q_norm",
    "layers/attention/key_norm": "model.layers.{i}.self_attn.k_norm",
}
MLP = {
    "layers/mlp/gate": "model.layers.{i}.mlp.gate_proj",
    "layers/mlp/up": "model.layers.{i}.mlp.up_proj",
    "layers/mlp/down": "model.layers.{i}.mlp.down_proj",
}
NORMS = {
    "layers/attention_norm": "model.layers.{i}.input_layernorm",
    "layers/mlp_norm": "model.layers.{i}.post_attention_layernorm",
}
OUTSIDE = {
    "embed/embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm",
    "lm_head": "lm_head",
    "head": "score",
}
TABLE: Table = ATTENTION | MLP | NORMS | OUTSIDE
LEFT_OVER = (r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",)
DEFAULTS: Json = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}


def read(config: Json) -> Fields:
    """The fields of a pre-norm decoder with RMSNorm and a gated MLP, from keys of Llama with defaults filled in."""
    return (
        sizes(config)
        | rope(config)
        | {
            "activation": activation(config["hidden_act"]),
            "norm_epsilon": tidy(config["rms_norm_eps"]),
            "attention_bias": "all" if config["attention_bias"] else "none",
            "mlp_bias": bool(config["mlp_bias"]),
        }
    )


def write(model: ModelConfig) -> dict[str, Any]:
    """The inverse of `read`, without rope_parameters and biases."""
    return write_sizes(model) | {"hidden_act": write_activation(model), "rms_norm_eps": model.norm_epsilon}

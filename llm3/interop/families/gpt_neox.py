"""GPT-NeoX (Black et al. 2022) and Pythia (Biderman et al. 2023): attention and MLP side by side, each with a norm."""

from typing import Any

from llm3.config.model_schema import ModelConfig
from llm3.interop.config_json import (
    Fields,
    Json,
    activation,
    rope,
    sizes,
    tidy,
    write_activation,
    write_rope,
    write_sizes,
)
from llm3.interop.table import PROJECTIONS, Table, fused

MODEL_TYPES = ("gpt_neox",)
LM, CLASSIFIER = "GPTNeoXForCausalLM", "GPTNeoXForSequenceClassification"
BASE = "gpt_neox."
QKV = tuple(f"layers/attention/{each}" for each in PROJECTIONS)
TABLE: Table = {
    "embed/embedding": "gpt_neox.embed_in.weight",
    "layers/attention_norm": "gpt_neox.layers.{i}.input_layernorm",
    **fused("gpt_neox.layers.{i}.attention.query_key_value", QKV, interleaved=True),
    "layers/attention/out": "gpt_neox.layers.{i}.attention.dense",
    "layers/mlp_norm": "gpt_neox.layers.{i}.post_attention_layernorm",
    "layers/mlp/up": "gpt_neox.layers.{i}.mlp.dense_h_to_4h",
    "layers/mlp/down": "gpt_neox.layers.{i}.mlp.dense_4h_to_h",
    "final_norm": "gpt_neox.final_layer_norm",
    "lm_head": "embed_out",
    "head": "score",
}
LEFT_OVER = (
    r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",  # masks and frequencies
    r"gpt_neox\.rotary_emb\.inv_freq",
)
DEFAULTS: Json = {
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "rotary_emb_base": 10_000.0,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "use_parallel_residual": True,
    "attention_bias": True,
}


def read_config(json: Json) -> Fields:
    """The fields of a ModelConfig."""
    json = DEFAULTS | {"rotary_emb_base": json.get("rope_theta", 10_000.0)} | json
    return (
        sizes({**json, "head_dim": None, "num_key_value_heads": None})
        | rope(json, theta_key="rotary_emb_base", fraction_key="rotary_pct")
        | {
            "block": "parallel" if json["use_parallel_residual"] else "pre",
            "norm": "layernorm",
            "norm_epsilon": tidy(json["layer_norm_eps"]),
            "activation": activation(json["hidden_act"]),
            "gated_mlp": False,
            "attention_bias": "all" if json["attention_bias"] else "none",
            "mlp_bias": True,
        }
    )


def write_config(model: ModelConfig) -> dict[str, Any]:
    """The keys of config.json."""
    written = write_sizes(model) | write_rope(model)
    written["rope_parameters"]["partial_rotary_factor"] = model.rope_fraction
    del written["head_dim"], written["num_key_value_heads"]
    return written | {
        "hidden_act": write_activation(model, "gelu_new"),
        "layer_norm_eps": model.norm_epsilon,
        "use_parallel_residual": model.block == "parallel",
        "attention_bias": model.attention_bias == "all",
    }

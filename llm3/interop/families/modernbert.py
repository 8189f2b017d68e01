"""ModernBERT (Warner et al. 2024): a pre-norm encoder with rotary positions, GeGLU, and windows in most layers."""

from typing import Any

from llm3.config.model_schema import ModelConfig
from llm3.errors import UserError
from llm3.interop.config_json import (
    FULL,
    SLIDING,
    Fields,
    Json,
    activation,
    expect,
    layer_types,
    rope,
    sizes,
    tidy,
    windows,
    write_activation,
    write_rope_by_type,
    write_sizes,
)
from llm3.interop.table import PROJECTIONS, Table, fused

MODEL_TYPES = ("modernbert",)
LM = "ModernBertForMaskedLM"
CLASSIFIER = ""  # its head for sequences goes through the transform of the LM head
BASE = "model."
TABLE: Table = {
    "embed/embedding": "model.embeddings.tok_embeddings.weight",
    "embed/norm": "model.embeddings.norm",
    "layers/attention_norm": "model.layers.{i}.attn_norm",
    **fused("model.layers.{i}.attn.Wqkv", tuple(f"layers/attention/{each}" for each in PROJECTIONS)),
    "layers/attention/out": "model.layers.{i}.attn.Wo",
    "layers/mlp_norm": "model.layers.{i}.mlp_norm",
    **fused("model.layers.{i}.mlp.Wi", ("layers/mlp/gate", "layers/mlp/up")),
    "layers/mlp/down": "model.layers.{i}.mlp.Wo",
    "final_norm": "model.final_norm",
    "lm_transform/dense": "head.dense",
    "lm_transform/norm": "head.norm",
    "lm_head": "decoder",
}
LEFT_OVER = ()
DEFAULTS: Json = {
    "hidden_activation": "gelu",
    "norm_eps": 1e-5,
    "norm_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
    "classifier_bias": False,
    "decoder_bias": True,
    "local_attention": 128,
    "global_attn_every_n_layers": 3,
    "global_rope_theta": 160_000.0,
    "local_rope_theta": 10_000.0,
    "tie_word_embeddings": True,
}


def read_config(json: Json) -> Fields:
    """The fields of a ModelConfig."""
    json = DEFAULTS | json
    expect(json, classifier_activation=json["hidden_activation"], rope_scaling=None)
    name = (json.get("architectures") or [LM])[0]
    if name not in (LM, "ModernBertModel"):
        raise UserError(f"config.json: {name}: its task head goes through the LM head's transform; expected {LM}")
    layers, every = range(json["num_hidden_layers"]), json["global_attn_every_n_layers"]
    types = json.get("layer_types") or [SLIDING if layer % every else FULL for layer in layers]
    fields = (
        sizes({**json, "head_dim": None, "num_key_value_heads": None})
        | rope(json, theta_key="global_rope_theta", window_key="local_rope_theta")
        | windows(types, json["local_attention"])
        | {
            "causal": False,
            "norm": "layernorm" if json["norm_bias"] else "layernorm_no_bias",
            "norm_epsilon": tidy(json["norm_eps"]),
            "skip_first_norm": True,
            "embedding_norm": True,
            "activation": activation(json["hidden_activation"]),
            "attention_bias": "all" if json["attention_bias"] else "none",
            "mlp_bias": bool(json["mlp_bias"]),
            "lm_transform": True,
            "lm_transform_bias": bool(json["classifier_bias"]),
            "lm_head_bias": bool(json["decoder_bias"]),
            "pool": "first" if json.get("classifier_pooling", "cls") == "cls" else "mean",
        }
    )
    return fields if fields["window"] else fields | {"window_rope_theta": 0.0}


def write_config(model: ModelConfig) -> dict[str, Any]:
    """The keys of config.json."""
    written = write_sizes(model) | write_rope_by_type(model)
    del written["head_dim"], written["num_key_value_heads"]
    return written | {
        "hidden_activation": write_activation(model),
        "classifier_activation": write_activation(model),
        "norm_eps": model.norm_epsilon,
        "norm_bias": model.norm == "layernorm",
        "attention_bias": model.attention_bias == "all",
        "mlp_bias": model.mlp_bias,
        "classifier_bias": model.lm_transform_bias,
        "decoder_bias": model.lm_head_bias,
        "classifier_pooling": "mean" if model.pool == "mean" else "cls",
        "local_attention": model.window or DEFAULTS["local_attention"],
        "layer_types": layer_types(model),
    }

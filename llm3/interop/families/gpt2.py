"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm, projections as Conv1D."""

from typing import Any

from llm3.config.model_schema import ModelConfig
from llm3.interop.config_json import Fields, Json, activation, expect, need, tidy, write_activation
from llm3.interop.table import PROJECTIONS, Source, Table, fused

MODEL_TYPES = ("gpt2",)
LM, CLASSIFIER = "GPT2LMHeadModel", "GPT2ForSequenceClassification"
BASE = "transformer."
TABLE: Table = {
    "embed/embedding": "transformer.wte.weight",
    "embed/position": "transformer.wpe.weight",
    "layers/attention_norm": "transformer.h.{i}.ln_1",
    **fused("transformer.h.{i}.attn.c_attn", tuple(f"layers/attention/{each}" for each in PROJECTIONS), conv1d=True),
    "layers/attention/out": Source("transformer.h.{i}.attn.c_proj", conv1d=True),
    "layers/mlp_norm": "transformer.h.{i}.ln_2",
    "layers/mlp/up": Source("transformer.h.{i}.mlp.c_fc", conv1d=True),
    "layers/mlp/down": Source("transformer.h.{i}.mlp.c_proj", conv1d=True),
    "final_norm": "transformer.ln_f",
    "lm_head": "lm_head",
    "head": "score",
}
LEFT_OVER = (r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",)  # masks
DEFAULTS: Json = {
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "n_inner": None,
    "scale_attn_weights": True,
    "tie_word_embeddings": True,
}


def read_config(json: Json) -> Fields:
    """The fields of a ModelConfig."""
    json = DEFAULTS | json
    expect(json, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    width, heads = need(json, "n_embd"), need(json, "n_head")
    return {
        "layers": need(json, "n_layer"),
        "d_model": width,
        "heads": heads,
        "kv_heads": heads,
        "head_dim": width // heads,
        "d_ff": json["n_inner"] or 4 * width,
        "vocab_size": need(json, "vocab_size"),
        "tie_embeddings": bool(json["tie_word_embeddings"]),
        "positions": "learned",
        "max_positions": need(json, "n_positions"),
        "norm": "layernorm",
        "norm_epsilon": tidy(json["layer_norm_epsilon"]),
        "activation": activation(json["activation_function"]),
        "gated_mlp": False,
        "attention_bias": "all",
        "mlp_bias": True,
        "attention_scale": 0.0 if json["scale_attn_weights"] else 1.0,
    }


def write_config(model: ModelConfig) -> dict[str, Any]:
    """The keys of config.json."""
    return {
        "vocab_size": model.vocab_size,
        "n_positions": model.max_positions,
        "n_embd": model.d_model,
        "n_layer": model.layers,
        "n_head": model.heads,
        "n_inner": model.d_ff,
        "activation_function": write_activation(model, "gelu_new"),
        "layer_norm_epsilon": model.norm_epsilon,
        "scale_attn_weights": model.attention_scale != 1.0,
        "tie_word_embeddings": model.tie_embeddings,
    }

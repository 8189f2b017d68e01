"""Phi-3 and Phi-4 (Abdin et al. 2024) of short context: Llama with fused projections."""

from typing import Any

from llm3.config.model_schema import ModelConfig
from llm3.interop import llama_like
from llm3.interop.config_json import SLIDING, Fields, Json, expect, rope, windows, write_rope
from llm3.interop.table import PROJECTIONS, Table, fused

MODEL_TYPES = ("phi3",)
LM, CLASSIFIER = "Phi3ForCausalLM", "Phi3ForSequenceClassification"
BASE = "model."
TABLE: Table = {
    **llama_like.TABLE,
    **fused("model.layers.{i}.self_attn.qkv_proj", tuple(f"layers/attention/{each}" for each in PROJECTIONS)),
    **fused("model.layers.{i}.mlp.gate_up_proj", ("layers/mlp/gate", "layers/mlp/up")),
}
LEFT_OVER = llama_like.LEFT_OVER
DEFAULTS: Json = llama_like.DEFAULTS | {"rms_norm_eps": 1e-5, "partial_rotary_factor": 1.0}


def read_config(json: Json) -> Fields:
    """The fields of a ModelConfig."""
    json = DEFAULTS | json
    expect(json, attention_bias=False, mlp_bias=False)
    fields = llama_like.read(json) | rope(json, fraction_key="partial_rotary_factor")
    return fields | windows([SLIDING], json.get("sliding_window"))


def write_config(model: ModelConfig) -> dict[str, Any]:
    """The keys of config.json."""
    written = llama_like.write(model) | write_rope(model) | {"sliding_window": model.window or None}
    written["rope_parameters"]["partial_rotary_factor"] = model.rope_fraction
    return written

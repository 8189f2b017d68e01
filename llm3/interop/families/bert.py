"""BERT (Devlin et al. 2019): a post-norm encoder with learned positions and token types."""

from typing import Any

from llm3.config.model_schema import ModelConfig
from llm3.interop.config_json import Fields, Json, activation, expect, need, sizes, tidy, write_activation, write_sizes
from llm3.interop.table import Table

MODEL_TYPES = ("bert",)
LM, CLASSIFIER = "BertForMaskedLM", "BertForSequenceClassification"
BASE = "bert."


def encoder(base: str) -> dict[str, str]:
    """The leaves of the encoder of BERT and RoBERTa, without heads. base: the prefix of their names."""
    layer = base + "encoder.layer.{i}."
    return {
        "embed/embedding": base + "embeddings.word_embeddings.weight",
        "embed/position": base + "embeddings.position_embeddings.weight",
        "embed/token_type": base + "embeddings.token_type_embeddings.weight",
        "embed/norm": base + "embeddings.LayerNorm",
        "layers/attention/query": layer + "attention.self.query",
        "layers/attention/key": layer + "attention.self.key",
        "layers/attention/value": layer + "attention.self.value",
        "layers/attention/out": layer + "attention.output.dense",
        "layers/attention_norm": layer + "attention.output.LayerNorm",
        "layers/mlp/up": layer + "intermediate.dense",
        "layers/mlp/down": layer + "output.dense",
        "layers/mlp_norm": layer + "output.LayerNorm",
    }


TABLE: Table = {
    **encoder(BASE),
    "lm_transform/dense": "cls.predictions.transform.dense",
    "lm_transform/norm": "cls.predictions.transform.LayerNorm",
    "lm_head/bias": "cls.predictions.bias",
    "pooler": "bert.pooler.dense",
    "head": "classifier",
}
# the head for pairs of sentences, and copies of tied leaves
LEFT_OVER = (
    r"bert\.embeddings\.position_ids",
    r"cls\.seq_relationship\.(weight|bias)",
    r"cls\.predictions\.decoder\.(weight|bias)",
)
DEFAULTS: Json = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "type_vocab_size": 2, "tie_word_embeddings": True}


def read_config(json: Json) -> Fields:
    """The fields of a ModelConfig."""
    json = DEFAULTS | json
    return read_encoder(json) | {"max_positions": need(json, "max_position_embeddings")}


def write_config(model: ModelConfig) -> dict[str, Any]:
    """The keys of config.json."""
    return write_encoder(model) | {"max_position_embeddings": model.max_positions}


def read_encoder(json: Json) -> Fields:
    """What BERT and RoBERTa share."""
    expect(
        json,
        position_embedding_type="absolute",
        is_decoder=False,
        add_cross_attention=False,
        tie_word_embeddings=True,
    )
    return sizes({**json, "head_dim": None, "num_key_value_heads": None}) | {
        "causal": False,
        "block": "post",
        "norm": "layernorm",
        "norm_epsilon": tidy(json["layer_norm_eps"]),
        "final_norm": False,
        "activation": activation(json["hidden_act"]),
        "gated_mlp": False,
        "attention_bias": "all",
        "mlp_bias": True,
        "positions": "learned",
        "token_types": json["type_vocab_size"],
        "embedding_norm": True,
        "lm_transform": True,
        "lm_head_bias": True,
        "pool": "first",
    }


def write_encoder(model: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_encoder`."""
    written = write_sizes(model)
    del written["head_dim"], written["num_key_value_heads"]
    return written | {
        "hidden_act": write_activation(model, "gelu_new"),
        "layer_norm_eps": model.norm_epsilon,
        "type_vocab_size": model.token_types,
    }

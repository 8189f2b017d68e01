"""RoBERTa (Liu et al. 2019): BERT whose positions begin after the id of the padding token."""

from typing import Any

from llm3.config.model_schema import ModelConfig
from llm3.interop.config_json import Fields, Json, expect, need
from llm3.interop.families.bert import DEFAULTS, encoder, read_encoder, write_encoder
from llm3.interop.table import Table

MODEL_TYPES = ("roberta", "xlm-roberta")
LM, CLASSIFIER = "RobertaForMaskedLM", "RobertaForSequenceClassification"
BASE = "roberta."
TABLE: Table = {
    **encoder(BASE),
    "lm_transform/dense": "lm_head.dense",
    "lm_transform/norm": "lm_head.layer_norm",
    "lm_head/bias": "lm_head.bias",
    "pooler": "classifier.dense",
    "head": "classifier.out_proj",
}
# a pooler that no head of RoBERTa reads, and copies of tied leaves
LEFT_OVER = (
    r"roberta\.embeddings\.position_ids",
    r"roberta\.pooler\.dense\.(weight|bias)",
    r"lm_head\.decoder\.(weight|bias)",
)


def read_config(json: Json) -> Fields:
    """The fields of a ModelConfig. In the file, max_position_embeddings counts rows that no token reads."""
    json = DEFAULTS | {"pad_token_id": 1} | json
    expect(json, hidden_act="gelu")  # of its LM head, whatever the activation of the MLP is
    offset = json["pad_token_id"] + 1
    rows = need(json, "max_position_embeddings")
    return read_encoder(json) | {"position_offset": offset, "max_positions": rows - offset}


def write_config(model: ModelConfig) -> dict[str, Any]:
    """The keys of config.json; pad_token_id is that of the positions."""
    return write_encoder(model) | {
        "max_position_embeddings": model.max_positions + model.position_offset,
        "pad_token_id": model.position_offset - 1,
    }

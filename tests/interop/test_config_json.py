"""config.json as the files of well-known models have it, and the fields that say the same in llm3."""

import re

import pytest

from llm3.config.model_schema import ModelConfig, RopeScaling
from llm3.errors import UserError
from llm3.interop import families
from llm3.interop.family import family_of_json, family_of_model, load_family, model_types, not_expressed
from llm3.registry import plugin_names

BASE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
STRETCHED = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)

# {model: (what its config.json says besides the sizes, what that means)}
HUB = {
    "Llama 3.1": (
        {"model_type": "llama", "rope_theta": 500000.0, "rope_scaling": LLAMA3 | {"rope_type": "llama3"}},
        {"rope_theta": 500000.0, "rope_scaling": STRETCHED, "tie_embeddings": False, "kv_heads": 4, "head_dim": 8},
    ),
    "SmolLM2": (
        {"model_type": "llama", "rms_norm_eps": 9.999999747378752e-06, "tie_word_embeddings": True},
        {"norm_epsilon": 1e-5, "tie_embeddings": True},
    ),
    "linear scaling of old files": (
        {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_scaling": RopeScaling("linear", 4.0)},
    ),
    "no scaling": (
        {"model_type": "llama", "rope_scaling": None, "head_dim": None, "num_key_value_heads": None},
        {"rope_scaling": None, "head_dim": 8, "kv_heads": 4},
    ),
    "SmolLM3": ({"model_type": "smollm3", "num_key_value_heads": 2}, {"no_rope_layers": (3,), "rope_theta": 2e6}),
    "Mistral 7B v0.1": (
        {"model_type": "mistral", "sliding_window": 16, "num_key_value_heads": 2},
        {"window": 16, "full_attention_layers": ()},
    ),
    "Mistral 7B v0.3": ({"model_type": "mistral", "sliding_window": None, "num_key_value_heads": 2}, {"window": 0}),
    "Qwen2.5": (
        {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 3},
        {"window": 0, "attention_bias": "qkv"},
    ),
    "Qwen2 with windows": (
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 4},
        {"window": 16, "full_attention_layers": (0, 1, 2, 3)},
    ),
    "Qwen3": ({"model_type": "qwen3"}, {"head_dim": 128, "qk_norm": "head", "attention_bias": "none"}),
    "Gemma 2": (
        {"model_type": "gemma2", "head_dim": 8, "query_pre_attn_scalar": 16, "sliding_window": 16},
        {
            "window": 16,
            "full_attention_layers": (1, 3, 5),
            "attention_scale": 0.25,
            "attention_softcap": 50.0,
            "logit_softcap": 30.0,
            "embedding_scale": 32**0.5,
            "activation": "gelu_tanh",
            "tie_embeddings": True,
        },
    ),
    "Gemma 3": (
        {
            "model_type": "gemma3_text",
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "rope_local_base_freq": 10000,
            "rope_theta": 1000000,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 16,
            "sliding_window_pattern": 6,
        },
        {
            "window": 16,
            "full_attention_layers": (5,),
            "rope_theta": 1e6,
            "window_rope_theta": 1e4,
            "rope_scaling": RopeScaling("linear", 8.0),
            "attention_scale": 0.0,
            "attention_softcap": 0.0,
        },
    ),
    "Phi-2": (
        {"model_type": "phi", "partial_rotary_factor": 0.5, "hidden_act": "gelu_new"},
        {"rope_fraction": 0.5, "block": "parallel_one_norm", "lm_head_bias": True, "gated_mlp": False},
    ),
    "Phi-3 mini 4k": ({"model_type": "phi3", "rope_scaling": None, "sliding_window": 2047}, {"window": 2047}),
    "Pythia": (
        {"model_type": "gpt_neox", "rotary_pct": 0.25, "rotary_emb_base": 10000, "use_parallel_residual": True},
        {"rope_fraction": 0.25, "block": "parallel", "attention_bias": "all", "activation": "gelu"},
    ),
    "OLMo 2": ({"model_type": "olmo2", "rope_theta": 500000}, {"block": "after", "qk_norm": "projection"}),
    "OLMo 3": (
        {"model_type": "olmo3", "sliding_window": 16},
        {"window": 16, "full_attention_layers": (3,), "rope_theta": 5e5, "window_rope_theta": 0.0},
    ),
    "BERT": (
        {"model_type": "bert", "max_position_embeddings": 24, "layer_norm_eps": 1e-12, "hidden_act": "gelu"},
        {"max_positions": 24, "position_offset": 0, "token_types": 2, "causal": False, "final_norm": False},
    ),
    "RoBERTa": (
        {"model_type": "roberta", "max_position_embeddings": 26, "type_vocab_size": 1, "pad_token_id": 1},
        {"max_positions": 24, "position_offset": 2, "token_types": 1},
    ),
    "ModernBERT": (
        {"model_type": "modernbert", "global_rope_theta": 160000.0, "local_rope_theta": 10000.0, "norm_eps": 1e-05},
        {
            "window": 128,
            "full_attention_layers": (0, 3),
            "rope_theta": 160000.0,
            "window_rope_theta": 10000.0,
            "norm": "layernorm_no_bias",
            "skip_first_norm": True,
            "lm_transform_bias": False,
        },
    ),
}
GPT2 = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 16}
CASES = {name: (BASE | said, fields) for name, (said, fields) in HUB.items()} | {
    "GPT-2": (GPT2, {"d_ff": 128, "max_positions": 16, "activation": "gelu_tanh", "tie_embeddings": True})
}


@pytest.mark.parametrize("name", CASES)
def test_the_files_of_the_hub_are_understood(name):
    described, expected = CASES[name]
    model = ModelConfig(**load_family(family_of_json(described)).read_config(described))
    found = {field: getattr(model, field) for field in expected}
    assert found == expected


@pytest.mark.parametrize("name", CASES)
def test_what_is_read_can_be_written(name):
    described, _ = CASES[name]
    family = family_of_json(described)
    model = ModelConfig(**load_family(family).read_config(described))
    assert not_expressed(model, family) == {}
    assert family_of_model(model, family) == family


@pytest.mark.parametrize("name", plugin_names(families))
def test_a_family_is_a_plugin(name):
    family = load_family(name)
    assert family.__doc__ and family.LM and isinstance(family.CLASSIFIER, str)
    assert all(model_types()[kind] == name for kind in family.MODEL_TYPES), "no other family has its types"
    assert any(path == "embed/embedding" for path in family.TABLE)
    assert bool(family.CLASSIFIER) == ("head" in family.TABLE)
    assert all(re.compile(pattern) for pattern in family.LEFT_OVER)


def test_every_family_is_tried():
    assert {family_of_json(described) for described, _ in CASES.values()} == set(plugin_names(families))


@pytest.mark.parametrize("name", ["Llama 3.1", "Gemma 3", "Pythia", "ModernBERT", "OLMo 3", "Phi-2"])
def test_rope_parameters_say_what_older_files_said(name):
    described, _ = CASES[name]
    family = load_family(family_of_json(described))
    fields = family.read_config(described)
    new = family.write_config(ModelConfig(**fields)) | {"model_type": described["model_type"]}
    assert "rope_parameters" in new and not any(key.startswith("rope_theta") for key in new)
    again = family.read_config(new)
    assert {k: v for k, v in again.items() if "rope" in k} == {k: v for k, v in fields.items() if "rope" in k}


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("Llama 3.1", "logit_softcap", 30.0),
        ("Gemma 2", "embedding_scale", 1.0),
        ("Qwen3", "window_rope_theta", 5.0),
        ("Pythia", "rope_interleaved", True),
        ("BERT", "final_norm", True),
    ],
)
def test_a_field_that_the_family_of_a_model_cannot_say_is_named(name, field, value):
    described, _ = CASES[name]
    family = family_of_json(described)
    fields = load_family(family).read_config(described) | {field: value}
    if field == "window_rope_theta":
        fields |= {"window": 8}
    with pytest.raises(UserError, match=f"model.{field}={value!r}.* has no counterpart in transformers' {family}"):
        family_of_model(ModelConfig(**fields), family)

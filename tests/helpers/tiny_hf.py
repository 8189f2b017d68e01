"""Tiny random models made by transformers, one of each family, far from their initial values.

At the default initializer_range of 0.02, a missing soft-cap or another GELU changes logits by less than 1e-5.
"""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

REASON = "needs torch and pip install 'llm3[hf]'"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)

VOCAB, LAYERS = 128, 3
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HALF = {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"}
SLIDING, FULL = "sliding_attention", "full_attention"
GEMMA = {"head_dim": 24, "sliding_window": 8, "query_pre_attn_scalar": 20, "layer_types": [SLIDING, FULL, SLIDING]}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GPT2 = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": LAYERS, "n_head": 4, "n_positions": 256}
ENCODER = {**HALF, "pad_token_id": 0}
ROBERTA = ENCODER | {"max_position_embeddings": 258, "pad_token_id": 1, "bos_token_id": 0, "type_vocab_size": 1}
MODERN = {"local_attention": 8, "global_attn_every_n_layers": 3, "cls_token_id": 1, "sep_token_id": 2}

# {name: (config class, model class, fields)}; the first word of a name is the family
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", "LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama3 rope": ("Llama", "LlamaForCausalLM", {"rope_parameters": LLAMA3}),
    "llama tied": ("Llama", "LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama linear rope": (
        "Llama",
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}},
    ),
    "smollm3": ("SmolLM3", "SmolLM3ForCausalLM", {"no_rope_layers": [1, 1, 0]}),
    "mistral": ("Mistral", "MistralForCausalLM", {"sliding_window": 8, "head_dim": 16}),
    "qwen2": ("Qwen2", "Qwen2ForCausalLM", {}),
    "qwen2 windows": (
        "Qwen2",
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", "Qwen3ForCausalLM", {"head_dim": 24, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2", "Gemma2ForCausalLM", GEMMA),
    "gemma3": ("Gemma3Text", "Gemma3ForCausalLM", GEMMA),
    "phi": ("Phi", "PhiForCausalLM", {}),
    "phi3": ("Phi3", "Phi3ForCausalLM", {"sliding_window": 8}),
    "gpt2": ("GPT2", "GPT2LMHeadModel", {}),
    "gpt_neox": ("GPTNeoX", "GPTNeoXForCausalLM", {}),
    "gpt_neox sequential": ("GPTNeoX", "GPTNeoXForCausalLM", {"use_parallel_residual": False}),
    "olmo2": ("Olmo2", "Olmo2ForCausalLM", {}),
    "olmo3": ("Olmo3", "Olmo3ForCausalLM", {"sliding_window": 8, "layer_types": [SLIDING, FULL, SLIDING]}),
    "bert": ("Bert", "BertForMaskedLM", {}),
    "roberta": ("Roberta", "RobertaForMaskedLM", {}),
    "xlm-roberta": ("XLMRoberta", "XLMRobertaForMaskedLM", {}),
    "modernbert": ("ModernBert", "ModernBertForMaskedLM", MODERN),
}
BASES = {"GPT2": GPT2, "GPTNeoX": HALF, "Phi": HALF, "Bert": ENCODER, "Roberta": ROBERTA, "XLMRoberta": ROBERTA}
BASES["ModernBert"] = ENCODER


def make(kind: str, model_class: str, fields: dict[str, Any], seed: int = 0) -> Any:
    """A random model in float32, with noise on norms and biases, ready for evaluation."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    config = getattr(transformers, f"{kind}Config")(**BASES.get(kind, LLAMA) | {"initializer_range": 0.3} | fields)
    config._attn_implementation = "eager"
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@functools.cache
def tiny(name: str) -> Any:
    """The model of this name in FAMILIES."""
    return make(*FAMILIES[name])


def saved(name: str, folder: Path, max_shard_size: str = "50KB") -> Path:
    """The folder that transformers writes of a model, in several files."""
    tiny(name).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def logits(model: Any, tokens: np.ndarray, **arguments: Any) -> np.ndarray:
    """transformers' logits of one text, [T, V]."""
    with torch.no_grad():
        return model(torch.from_numpy(tokens[None].astype(np.int64)), **arguments).logits[0].numpy()

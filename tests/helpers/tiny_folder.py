"""Tiny random models of others, written without torch: a Llama with a byte-level BPE, and a BERT."""

import json
import pathlib

import numpy as np
import tokenizers
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TOKENS, ROWS = 300, 304  # the embedding has spare rows
SHAPE = {
    "vocab_size": ROWS,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "rms_norm_eps": 9.999999747378752e-06,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


def write_tokenizer(folder: pathlib.Path, texts: list[str]) -> None:
    """tokenizer.json and tokenizer_config.json, whose special tokens are none of llm3's."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = [AddedToken(each, special=True, normalized=False) for each in SPECIALS]
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=TOKENS, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    backend.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))


def tensors(seed: int = 0, **shape) -> dict[str, np.ndarray]:
    """The tensors of a random Llama, with noise on its norms."""
    c, random = SHAPE | shape, np.random.default_rng(seed)
    width, hidden = c["hidden_size"], c["intermediate_size"]
    inside, kv = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
    matrices = {
        **{"self_attn.q_proj": (inside, width), "self_attn.k_proj": (kv, width), "self_attn.v_proj": (kv, width)},
        **{"self_attn.o_proj": (width, inside), "mlp.gate_proj": (hidden, width), "mlp.up_proj": (hidden, width)},
        "mlp.down_proj": (width, hidden),
    }
    found = {"model.embed_tokens.weight": random.normal(0, 0.3, (c["vocab_size"], width)), "model.norm.weight": None}
    for layer in range(c["num_hidden_layers"]):
        for name, size in matrices.items():
            found[f"model.layers.{layer}.{name}.weight"] = random.normal(0, 0.3, size)
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{layer}.{name}.weight"] = None
    norm = lambda: 1 + random.normal(0, 0.1, width)  # noqa: E731
    return {name: (norm() if each is None else each).astype(np.float32) for name, each in found.items()}


def write_bert(folder: pathlib.Path, texts: list[str], layers: int = 2) -> pathlib.Path:
    """A random BERT without an LM head, as sentence encoders are published, with a WordPiece vocabulary."""
    folder.mkdir(parents=True)
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=TOKENS, special_tokens=special, show_progress=False)
    )
    backend.save(str(folder / "tokenizer.json"))
    named = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "mask_token": "[MASK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named | {"unk_token": "[UNK]"}))
    random, width, hidden = np.random.default_rng(0), 16, 32
    rows = {"word": ROWS, "position": 256, "token_type": 2}
    sizes = {f"embeddings.{name}_embeddings.weight": (size, width) for name, size in rows.items()}
    sizes |= {f"embeddings.LayerNorm.{kind}": (width,) for kind in ("weight", "bias")}
    for layer in range(layers):
        parts = {f"attention.self.{name}": (width, width) for name in ("query", "key", "value")}
        parts |= {"attention.output.dense": (width, width), "intermediate.dense": (hidden, width)}
        parts |= {"output.dense": (width, hidden), "attention.output.LayerNorm": (width,), "output.LayerNorm": (width,)}
        for name, size in parts.items():
            sizes[f"encoder.layer.{layer}.{name}.weight"] = size
            sizes[f"encoder.layer.{layer}.{name}.bias"] = size[:1]
    sizes |= {"pooler.dense.weight": (width, width), "pooler.dense.bias": (width,)}
    found = {name: random.normal(0, 0.3, size).astype(np.float32) for name, size in sizes.items()}
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    shape = {"vocab_size": ROWS, "hidden_size": width, "intermediate_size": hidden, "num_attention_heads": 2}
    shape |= {"num_hidden_layers": layers, "max_position_embeddings": 256, "type_vocab_size": 2, "hidden_act": "gelu"}
    described = {"model_type": "bert", "architectures": ["BertModel"], "layer_norm_eps": 1e-12, "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(shape | described))
    return folder


def write_folder(folder: pathlib.Path, texts: list[str], seed: int = 0, **changes) -> pathlib.Path:
    """A folder as transformers writes it. changes: of config.json, its shape included."""
    folder.mkdir(parents=True)
    shape = {name: value for name, value in changes.items() if name in SHAPE}
    save_file(tensors(seed, **shape), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(SHAPE | CONFIG | changes))
    write_tokenizer(folder, texts)
    return folder


def add_tensors(folder: pathlib.Path, more: dict[str, np.ndarray]) -> None:
    """Write more tensors into the file of a folder."""
    file = folder / "model.safetensors"
    save_file(load_file(file) | more, file, metadata={"format": "pt"})

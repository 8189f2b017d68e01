"""Tiny folders of somebody else's models, written by name without torch: a Llama, a Qwen3 and a BERT."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

SIZES = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": SIZES | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_key_value_heads": 2},
    "qwen3": SIZES
    | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "num_key_value_heads": 2, "head_dim": 8}
    | {"tie_word_embeddings": True},
    "bert": SIZES | {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def shapes(kind: str) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the tensors of a model."""
    c = CONFIGS[kind]
    v, d, f = c["vocab_size"], c["hidden_size"], c["intermediate_size"]
    head = c.get("head_dim", d // c["num_attention_heads"])
    inside, kv = c["num_attention_heads"] * head, c.get("num_key_value_heads", 4) * head
    found: dict[str, tuple[int, ...]] = {}
    linear = lambda name, out, into: found.update({f"{name}.weight": (out, into), f"{name}.bias": (out,)})  # noqa: E731
    norm = lambda name: found.update({f"{name}.weight": (d,), f"{name}.bias": (d,)})  # noqa: E731
    if kind == "bert":
        embeddings = "bert.embeddings."
        found[embeddings + "word_embeddings.weight"] = (v, d)
        found[embeddings + "position_embeddings.weight"] = (c["max_position_embeddings"], d)
        found[embeddings + "token_type_embeddings.weight"] = (2, d)
        norm(embeddings + "LayerNorm")
        for i in range(c["num_hidden_layers"]):
            layer = f"bert.encoder.layer.{i}."
            for name in ("self.query", "self.key", "self.value", "output.dense"):
                linear(f"{layer}attention.{name}", d, d)
            linear(f"{layer}intermediate.dense", f, d)
            linear(f"{layer}output.dense", d, f)
            norm(f"{layer}attention.output.LayerNorm")
            norm(f"{layer}output.LayerNorm")
        linear("cls.predictions.transform.dense", d, d)
        norm("cls.predictions.transform.LayerNorm")
        return found | {"cls.predictions.bias": (v,)}
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for name, size in {"q": (inside, d), "k": (kv, d), "v": (kv, d), "o": (d, inside)}.items():
            found[f"{layer}self_attn.{name}_proj.weight"] = size
        for name, size in {"gate": (f, d), "up": (f, d), "down": (d, f)}.items():
            found[f"{layer}mlp.{name}_proj.weight"] = size
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{layer}{name}.weight"] = (d,)
        if kind == "qwen3":
            found |= {f"{layer}self_attn.{each}_norm.weight": (head,) for each in "qk"}
    lm_head = {} if c.get("tie_word_embeddings") else {"lm_head.weight": (v, d)}
    return found | {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)} | lm_head


def tensors_of(kind: str, dtype: str = "float32") -> dict[str, np.ndarray]:
    """{name: random tensor} of a model."""
    import jax.numpy as jnp

    random = np.random.default_rng(0)
    return {name: random.standard_normal(size).astype(jnp.dtype(dtype)) for name, size in shapes(kind).items()}


def write_model(kind: str, folder: Path, dtype: str = "float32", **changes) -> Path:
    """A folder with one file of weights. changes: of config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors_of(kind, dtype), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIGS[kind] | changes))
    return folder


def change_tensors(folder: Path, change) -> Path:
    """Replace the tensors of a folder by `change(tensors)`."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


def cut_in_two(folder: Path) -> dict[str, str]:
    """Replace the one file of weights by two and an index; returns {tensor: file}."""
    tensors = load_file(folder / "model.safetensors")
    where = {name: SHARDS[i % 2] for i, name in enumerate(sorted(tensors))}
    for file in SHARDS:
        save_file({name: tensors[name] for name in tensors if where[name] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    write_index(folder, where)
    return where


def write_index(folder: Path, where: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))

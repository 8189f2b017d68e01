"""The verb `export`: write a stage as a directory that transformers and PEFT load without llm3.

The layouts are transformers' Llama (Touvron et al. 2023) and Qwen3 (2025; Llama with QK-norm), and PEFT's LoRA
adapters. Linear weights are [out, in]; rotary positions are half-split, as in llm3.

The head of a classifier that reads the last token is `score`, as in LlamaForSequenceClassification. That class has no
bias: it is exact for a head whose bias is zero, and leaves out any other.
"""

import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from llm3 import __version__
from llm3.checkpoints.load import load_stage
from llm3.cli.checks import check_export
from llm3.cli.export_head import reads_last_token, score, write_head
from llm3.cli.export_tensors import Save, contiguous, safetensors_writer
from llm3.cli.export_text import token_ids, write_generation, write_tokenizer
from llm3.config.schema import AdapterConfig, ModelConfig
from llm3.data.chat_templates import trained_template
from llm3.data.tokenizer import Tokenizer
from llm3.errors import UserError
from llm3.files import TOKENIZER, check_name, ordinary_permissions, write_json
from llm3.handoff.account import FREE_MODEL_FIELDS
from llm3.models.lora import merged
from llm3.tree import flatten

KERNELS = {
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/out": "self_attn.o_proj",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
}
NORMS = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attention/query_norm": "self_attn.q_norm",
    "attention/key_norm": "self_attn.k_norm",
}
OUTSIDE = {
    "embed/embedding": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "lm_head/kernel": "lm_head.weight",
}
# fields of a model that config.json holds
EXPRESSED = {"layers", "d_model", "heads", "kv_heads", "head_dim", "d_ff", "norm_epsilon", "rope_theta"}
EXPRESSED |= {"tie_embeddings", *FREE_MODEL_FIELDS}


def export(workdir: Path, stage: str, to: Path, form: str, step: str, base: str | None, dtype: str = "float32") -> int:
    """Write a checkpoint of a stage into the new directory `to` and print a summary.

    form: one of EXPORT_FORMATS. step: a number or "latest". base: the base model that the adapters name. dtype: one of
    EXPORT_DTYPES, that of the tensors; adapters are merged in float32. Before it writes anything, raises UserError for
    a model that the formats cannot express, a directory with files or a missing library.
    """
    check_export({"form": form, "base": base, "step": step, "dtype": dtype})
    save = safetensors_writer(dtype)
    params, config, meta = load_stage(workdir, stage, step)
    tokenizer = Tokenizer.load(workdir / TOKENIZER)
    if tokenizer.hash != meta["tokenizer_hash"]:
        raise UserError(f"{workdir / TOKENIZER} is not the tokenizer of {workdir / stage}")
    check_family(config)
    template = trained_template(workdir, stage, meta.get("chat_template"))
    for name, _ in config.adapters:
        check_name(name, f"{workdir / stage}: adapters")  # the name becomes a folder
    if form == "adapters" and not config.adapters:
        raise UserError(f"--format=adapters: {workdir / stage} has no adapters; --format=merged writes its model")
    with new_directory(to) as directory:
        if form == "adapters":
            lines = write_adapters(directory, params, config, base, save, reads_last_token(config, meta))
        else:
            described = model_json(config, meta, dtype) | token_ids(template, tokenizer)
            lines = write_model(directory, params, config, described, form, save)
            lines += write_tokenizer(directory, workdir / TOKENIZER, template, reads_last_token(config, meta))
            lines += write_generation(directory, template, tokenizer)
        if config.classes and (form == "adapters" or not reads_last_token(config, meta)):
            lines.append(write_head(directory, params, config, meta, save))
    print(f"{workdir / stage} step {meta['step']} -> {to}", *lines, sep="\n  ", flush=True)
    return 0


@contextmanager
def new_directory(to: Path) -> Iterator[Path]:
    """A temporary directory that is renamed to `to` at the end, or removed after an exception.

    Raises UserError if `to` exists and is not an empty directory, or if it cannot be written.
    """
    to = to.resolve()
    if to.exists() and not (to.is_dir() and not any(to.iterdir())):
        raise UserError(f"--to={to} exists: expected a new or an empty directory; nothing was overwritten")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=to.parent, prefix=f".{to.name}.") as holder:
            inner = Path(holder) / to.name  # temporary directories lack ordinary permissions, so make another inside
            inner.mkdir()
            yield inner
            ordinary_permissions(inner)
            inner.rename(to)  # fails if `to` has files by now
    except OSError as error:
        raise UserError(f"--to={to} cannot be written: {error.strerror or error}") from error


def check_family(config: ModelConfig) -> None:
    """Raise UserError for a model that neither Llama nor Qwen3 can express."""
    for field in dataclasses.fields(ModelConfig):
        value, expected = getattr(config, field.name), field.default
        if (field.name == "qk_norm" and value == "head") or (field.name == "attention_bias" and value == "all"):
            continue
        if field.name not in EXPRESSED and value != expected:
            raise UserError(
                f"model.{field.name}={value!r} has no counterpart in transformers' Llama and Qwen3: only a model with "
                f"{field.name}={expected!r} can be exported"
            )
    if config.qk_norm == "none" and config.d_model % config.heads:
        raise UserError(
            f"model.heads={config.heads} does not divide model.d_model={config.d_model}: transformers' Llama rejects "
            "that; only a model with qk_norm='head' (Qwen3) may have such heads"
        )


def write_model(
    directory: Path, params: dict, config: ModelConfig, described: dict, form: str, save: Save
) -> list[str]:
    """Write config.json, which is `described`, and model.safetensors; returns lines of a summary."""
    tensors = model_tensors(merged(params, config.adapters) if form == "merged" else params)
    lines: list[str] = []
    if "id2label" in described:
        head, lines = score(params)
        tensors |= head
    written = save(directory / "model.safetensors", tensors, {"format": "pt", "llm3": __version__})
    write_json(directory / "config.json", described)
    family = described["architectures"][0]
    lines = [f"model.safetensors: {family}, {written}" + ", tied lm_head" * config.tie_embeddings, *lines]
    for name, adapter in config.adapters:
        omitted = "omitted, --format=base" if form == "base" else "" if adapter.active else "omitted, it is inactive"
        lines.append(f"adapter {name} of rank {adapter.rank}: {omitted or 'merged into the kernels'}")
    return lines


def model_tensors(params: dict) -> dict[str, np.ndarray]:
    """{transformers' name: float32 array} of canonical parameters, without adapters and the task head."""
    tensors = {}
    for path, leaf in flatten(params).items():
        if path in OUTSIDE:
            tensors[OUTSIDE[path]] = contiguous(leaf.T if path == "lm_head/kernel" else leaf)
            continue
        module_path, _, kind = path.removeprefix("layers/").rpartition("/")
        if module_path in KERNELS and kind in ("kernel", "bias"):
            module = KERNELS[module_path] + (".weight" if kind == "kernel" else ".bias")
        elif module_path in NORMS and kind == "scale":
            module = NORMS[module_path] + ".weight"
        elif module_path == "head" or "/lora/" in path:
            continue
        else:
            raise UserError(f"the leaf {path} has no counterpart in transformers' Llama and Qwen3")
        for i, each in enumerate(leaf):
            tensors[f"model.layers.{i}.{module}"] = contiguous(
                matrix(each, module_path).T if kind == "kernel" else each.reshape(-1)
            )
    return tensors


def matrix(kernel: np.ndarray, module_path: str) -> np.ndarray:
    """[*inputs, *outputs] -> [inputs, outputs]; only `out` has several input axes."""
    return (
        kernel.reshape(-1, kernel.shape[-1]) if module_path == "attention/out" else kernel.reshape(kernel.shape[0], -1)
    )


def model_json(config: ModelConfig, meta: dict, dtype: str) -> dict:
    """transformers' config.json without the token ids: Qwen3 with QK-norm, else Llama.

    It has labels only if the task head is where transformers reads it; otherwise transformers would fill in a random
    head for them.
    """
    qwen, classifier = config.qk_norm == "head", reads_last_token(config, meta)
    described = {
        "architectures": [
            ("Qwen3" if qwen else "Llama") + ("ForSequenceClassification" if classifier else "ForCausalLM")
        ],
        "model_type": "qwen3" if qwen else "llama",
        "dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": config.attention_bias == "all",
        "rms_norm_eps": config.norm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": meta["config"]["stage"]["sequence_length"],  # the longest window in training
    }
    if classifier:
        described["id2label"] = {str(i): label for i, label in enumerate(meta["labels"])}
        described["label2id"] = {label: i for i, label in enumerate(meta["labels"])}
        if meta.get("label_sets"):
            described["problem_type"] = "multi_label_classification"
    return described


def write_adapters(
    directory: Path, params: dict, config: ModelConfig, base: str | None, save: Save, classifier: bool
) -> list[str]:
    """Write adapter_config.json and adapter_model.safetensors in a folder per adapter; returns lines of a summary.

    classifier: each of them has the weight of the task head as well, which PEFT puts into transformers' classifier.
    """
    lines = []
    for name, adapter in config.adapters:
        tensors = adapter_tensors(params, name)
        if classifier:
            tensors["base_model.model.score.weight"] = contiguous(params["head"]["kernel"].T)
        folder = directory / name
        folder.mkdir()
        written = save(folder / "adapter_model.safetensors", tensors, {"format": "pt", "llm3": __version__})
        write_json(folder / "adapter_config.json", adapter_json(adapter, base, classifier))
        lines.append(f"{name}/adapter_model.safetensors: {written}, on {', '.join(adapter.targets)}")
    return [*lines, f"base model: {base or 'not named (--base); this stage with --format=base writes it'}"]


def adapter_tensors(params: dict, name: str) -> dict[str, np.ndarray]:
    """{PEFT's name: float32 array} of one adapter: lora_A [r, in], lora_B [out, r], lora_magnitude_vector [out]."""
    tensors = {}
    for path, leaf in flatten(params).items():
        module_path, found, ending = path.removeprefix("layers/").partition(f"/lora/{name}/")
        if not found:
            continue
        for i, each in enumerate(leaf):
            module = f"base_model.model.model.layers.{i}.{KERNELS[module_path]}"
            if ending == "a":
                tensors[f"{module}.lora_A.weight"] = contiguous(each.reshape(-1, each.shape[-1]).T)
            elif ending == "b":
                tensors[f"{module}.lora_B.weight"] = contiguous(each.reshape(each.shape[0], -1).T)
            else:
                tensors[f"{module}.lora_magnitude_vector"] = contiguous(each.reshape(-1))
    return tensors


def adapter_json(adapter: AdapterConfig, base: str | None, classifier: bool) -> dict:
    """PEFT's adapter_config.json."""
    modules = {module_path.rpartition("/")[2]: module.rpartition(".")[2] for module_path, module in KERNELS.items()}
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if classifier else "CAUSAL_LM",
        "modules_to_save": ["score"] if classifier else None,
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "use_rslora": adapter.rslora,
        "use_dora": adapter.dora,
        "lora_dropout": adapter.dropout,
        "target_modules": sorted(modules[target] for target in adapter.targets),
        "bias": "none",
        "inference_mode": True,
    }

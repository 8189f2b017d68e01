"""The task head of an export: in transformers' own place where that computes the same, else in a file of its own."""

import json
from pathlib import Path

import numpy as np

from llm3 import __version__, objectives
from llm3.cli.export_tensors import Save, contiguous
from llm3.config.schema import ModelConfig
from llm3.data.tokenizer import OWN, SPECIALS
from llm3.registry import load_plugin


def reads_last_token(config: ModelConfig, meta: dict) -> bool:
    """Whether a task head is what transformers' sequence classification has: classes, read at the last token."""
    if not config.classes or config.pool != "last":
        return False
    return load_plugin(objectives, objective_name(meta)).HEAD == "labels"


def objective_name(meta: dict) -> str:
    """The name of a stage's objective."""
    objective = meta["config"]["stage"]["objective"]
    return objective["name"] if isinstance(objective, dict) else objective


def score(params: dict) -> tuple[dict[str, np.ndarray], list[str]]:
    """The task head as `score.weight` [C, D] and, unless it is zero, `score.bias` [C]; and lines of a summary."""
    weight, bias = contiguous(params["head"]["kernel"].T), contiguous(params["head"]["bias"])
    lines = [f"score.weight: the head of {len(bias)} classes, where AutoModelForSequenceClassification reads it"]
    if not bias.any():
        return {"score.weight": weight}, lines
    lines.append(
        f"score.bias: up to {np.abs(bias).max():.3g}, which transformers leaves out; to add it, set model.score.bias = "
        "torch.nn.Parameter(safetensors.torch.load_file('model.safetensors')['score.bias']). A stage with "
        "train=['not head/bias', ...] has none"
    )
    return {"score.weight": weight, "score.bias": bias}, lines


def write_head(directory: Path, params: dict, config: ModelConfig, meta: dict, save: Save) -> str:
    """Write head.safetensors: weight [C, D], bias [C]; returns a line on how to use it."""
    head = {"weight": contiguous(params["head"]["kernel"].T), "bias": contiguous(params["head"]["bias"])}
    about = {"pool": config.pool, "labels": json.dumps(meta["labels"], ensure_ascii=False), "llm3": __version__}
    save(directory / "head.safetensors", head, about)
    hidden = "of each token"
    if load_plugin(objectives, objective_name(meta)).HEAD == "labels":
        hidden = f"at the final {SPECIALS[OWN.eos]}" if config.pool == "last" else "averaged over all tokens"
    place = "whose bias transformers leaves out" if reads_last_token(config, meta) else "with no place in transformers"
    return (
        f"head.safetensors: the task head of {config.classes} classes, {place}: "
        f"logits = weight @ h + bias, where h is the last hidden state {hidden}"
    )

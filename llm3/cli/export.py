"""The verb `export`: write a stage as a directory that transformers and PEFT load without llm3.

The layout is that of the family that the model came from; a model of llm3's own takes that of Llama (Touvron et al.
2023) or Qwen3 (2025; Llama with QK-norm), or of the first family that can express it.

The head of a classifier that reads the last token is `score`, as in LlamaForSequenceClassification. That class has no
bias: it is exact for a head whose bias is zero, and leaves out any other.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from llm3 import __version__, objectives
from llm3.checkpoints.load import load_stage, load_tokenizer
from llm3.cli.checks import check_export
from llm3.cli.export_text import padding_id, token_ids, write_generation, write_tokenizer
from llm3.config.model_schema import ModelConfig
from llm3.data.chat_templates import trained_template
from llm3.data.tokenizer import Tokenizer
from llm3.errors import UserError
from llm3.files import TOKENIZER, check_name, ordinary_permissions
from llm3.interop.adapters import write_adapters
from llm3.interop.family import family_of_model, load_family
from llm3.interop.heads import has_place
from llm3.interop.hub import check_push, push_folder
from llm3.interop.write import MAX_SHARD_SIZE, write_folder
from llm3.models.lora import merged
from llm3.registry import is_path, load_plugin


def export(
    workdir: Path,
    stage: str,
    to: Path,
    form: str,
    step: str,
    base: str | None,
    dtype: str = "float32",
    max_shard_size: str = MAX_SHARD_SIZE,
    push: str | None = None,
) -> int:
    """Write a checkpoint of a stage into the new directory `to` and print a summary.

    form: one of EXPORT_FORMATS. step: a number or "latest". base: the base model that the adapters name. dtype: one of
    DTYPES, that of the tensors; adapters are merged in float32. max_shard_size: of a file, as in "5GB". push:
    the repository on the Hugging Face Hub to upload the directory to. Before it writes anything, raises UserError for a
    model that the formats cannot express, a directory with files, or a Hub that cannot be written to.
    """
    check_export(
        {"form": form, "base": base, "step": step, "dtype": dtype, "max_shard_size": max_shard_size, "push": push}
    )
    if push is not None:
        check_push(push)
    exported = load_exported(workdir, stage, step, form)
    params, model, head = exported.params, exported.model, exported.head
    with new_directory(to) as directory:
        if form == "adapters":
            lines = write_adapters(directory, params, model, exported.family, base, head, dtype)
        else:
            lines = write_model(directory, exported, workdir / TOKENIZER, form, dtype, max_shard_size)
        if model.classes and (form == "adapters" or not head):
            end = exported.tokenizer.tokens[exported.tokenizer.eos_id]
            lines.append(write_head(directory, params, model, exported.meta, head, dtype, end))
    trained = exported.meta["step"]
    print(f"{workdir / stage} step {trained} -> {to}", *lines, sep="\n  ", flush=True)
    if push is not None:
        message = f"{stage} step {trained}, written by llm3 {__version__}"
        print(f"uploaded to {push_folder(to, push, message)}", flush=True)
    return 0


class Exported(NamedTuple):
    """A checkpoint to export. family: of its layout. head: whether the family has a place for its task head."""

    params: dict
    model: ModelConfig
    meta: dict
    tokenizer: Tokenizer
    template: str
    family: str
    head: bool


def load_exported(workdir: Path, stage: str, step: str, form: str) -> Exported:
    """Read a checkpoint and what belongs to it. Raises UserError if it cannot be exported as `form`."""
    params, model, meta = load_stage(workdir, stage, step)
    tokenizer = load_tokenizer(workdir, stage, meta)
    family = family_of_model(model, meta.get("model_family"))
    template = trained_template(workdir, stage, meta.get("chat_template"))
    for name, _ in model.adapters:
        check_name(name, f"{workdir / stage}: adapters")  # the name becomes a folder
    if form == "adapters" and not model.adapters:
        raise UserError(f"--format=adapters: {workdir / stage} has no adapters; --format=merged writes its model")
    head = has_place(load_family(family), model) and reads_documents(meta)
    return Exported(params, model, meta, tokenizer, template, family, head)


def write_model(
    directory: Path, exported: Exported, tokenizer_file: Path, form: str, dtype: str, max_shard_size: str
) -> list[str]:
    """Write the model, its tokenizer and its generation settings; returns lines of the summary."""
    _, model, meta, tokenizer, template, family, head = exported
    pad = padding_id(tokenizer, head and model.pool == "last")
    lines = write_folder(
        directory,
        merged(exported.params, model.adapters) if form == "merged" else exported.params,
        model,
        family=family,
        max_length=meta.get("model_max_length") or meta["config"]["stage"]["sequence_length"],
        labels=tuple(meta["labels"]) if head else (),
        several_labels=bool(meta.get("label_sets")),
        more={**(token_ids(template, tokenizer) if model.causal else {}), "pad_token_id": pad},
        dtype=dtype,
        max_shard_size=max_shard_size,
    )
    lines += about_head(model, head) + about_adapters(model, form)
    lines += write_tokenizer(directory, tokenizer_file, template, head or not model.causal, pad)
    return lines + (write_generation(directory, template, tokenizer) if model.causal else [])


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


def objective_name(meta: dict) -> str:
    """The name of a stage's objective."""
    objective = meta["config"]["stage"]["objective"]
    return objective["name"] if isinstance(objective, dict) else objective


def reads_documents(meta: dict) -> bool:
    """Whether the task head has labels for whole documents, not for tokens."""
    try:
        return load_plugin(objectives, objective_name(meta)).HEAD == "labels"
    except UserError:
        if not is_path(objective_name(meta)):
            raise
        return bool(meta["labels"])  # its module is where the config was


def about_head(model: ModelConfig, head: bool) -> list[str]:
    """A line of the summary if the task head is in the family's own place."""
    if not head:
        return []
    return [f"the task head of {model.classes} classes: where AutoModelForSequenceClassification reads it"]


def about_adapters(model: ModelConfig, form: str) -> list[str]:
    """A line of the summary for each adapter."""
    lines = []
    for name, adapter in model.adapters:
        omitted = "omitted, --format=base" if form == "base" else "" if adapter.active else "omitted, it is inactive"
        lines.append(f"adapter {name} of rank {adapter.rank}: {omitted or 'merged into the kernels'}")
    return lines


def write_head(directory: Path, params: dict, model: ModelConfig, meta: dict, head: bool, dtype: str, end: str) -> str:
    """Write head.safetensors: weight [C, D], bias [C], of the pooler too; returns a line on how to use it.

    head: whether the family has a place for the head all the same, beside adapters. end: the token that
    ends a text.
    """
    tensors = {"weight": params["head"]["kernel"].T, "bias": params["head"]["bias"]}
    if model.pooler:
        tensors |= {"pooler.weight": params["pooler"]["kernel"].T, "pooler.bias": params["pooler"]["bias"]}
    tensors = {name: np.ascontiguousarray(np.asarray(each, jnp.dtype(dtype))) for name, each in tensors.items()}
    about = {"pool": model.pool, "labels": json.dumps(meta["labels"], ensure_ascii=False), "llm3": __version__}
    save_file(tensors, directory / "head.safetensors", metadata=about)
    hidden = "of each token"
    if reads_documents(meta):
        hidden = {"last": f"at the final {end}", "first": "at the first token", "mean": "averaged over all tokens"}[
            model.pool
        ]
    place = "with no place in transformers"
    if head:
        place = "whose bias transformers leaves out" if model.causal else "as in transformers' classifier"
    state = "tanh(pooler.weight @ h + pooler.bias)" if model.pooler else "h"
    return (
        f"head.safetensors: the task head of {model.classes} classes, {place}: "
        f"logits = weight @ {state} + bias, where h is the last hidden state {hidden}"
    )

"""Runs of one stage with random parameters, as far as `export` reads them, and what it writes of them."""

import functools

import numpy as np
from safetensors.numpy import load_file

from llm3.checkpoints.stage_checkpoints import Checkpoints
from llm3.cli.export import export
from llm3.config.data_schema import SourceConfig
from llm3.config.schema import AdapterConfig, ModelConfig, as_dict
from llm3.data.chat_templates import template_hash
from llm3.data.tokenizer import Tokenizer, train
from llm3.tree import map_with_path
from tests.helpers.tiny import LENGTH, make_params, model_config

STAGE = "adapt"
TEXTS = ["The quick brown fox.\n\tjumps  over", "<|eos|> is text, and <|bos|> as well", "naïve 数学 🙂", " ", ""]
ADAPTERS = {
    "lora": AdapterConfig(rank=2, alpha=6),
    "rslora": AdapterConfig(rank=3, alpha=2, rslora=True),
    "dora": AdapterConfig(rank=2, alpha=6, dora=True),
    "some targets": AdapterConfig(rank=2, alpha=4, dora=True, targets=("query", "out", "down")),
}
# turns end with a token that was added to the vocabulary, or with a text of several tokens
CHAT = "{% for m in messages %}{{ '<' + m.role + '>' + m.content + 'END' + '\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
ADDED, SPELLED = CHAT.replace("END", "数学"), CHAT.replace("END", "<|im_end|>")


@functools.cache
def tokenizer() -> Tokenizer:
    return train(TEXTS, 270).extended(["fox", "数学"])


@functools.cache
def model(**changes) -> tuple[ModelConfig, dict]:
    """A config and its parameters, adapters large enough to change what the model says."""
    config = model_config(vocab_size=tokenizer().vocab_size, **changes)
    resize = {"a": lambda x: 0.3 * x, "b": lambda x: 0.3 * x, "magnitude": lambda x: 1 + 0.2 * x}
    return config, map_with_path(lambda path, x: resize.get(path.split("/")[-1], np.asarray)(x), make_params(config))


def write_run(
    workdir,
    config: ModelConfig,
    params: dict,
    labels: tuple[str, ...] = (),
    step: int = 7,
    template: str = "",
    text: Tokenizer | None = None,
    sources: dict[str, SourceConfig] | None = None,
    **meta,
) -> None:
    """A run of one stage with a checkpoint, as far as the verbs after training read it.

    text: its tokenizer. sources: those that it was trained on.
    """
    text = text or tokenizer()
    text.save(workdir / "tokenizer.json")
    if template:
        (workdir / "chat_template.jinja").write_text(template)
    meta |= {"model": as_dict(config), "labels": list(labels), "tokenizer_hash": text.hash}
    objective = meta.pop("objective", "classify" if config.classes else "causal")
    meta |= {"chat_template": template_hash(template)}
    meta = {"stage": STAGE, "lineage": []} | meta
    meta["config"] = {"stage": {"sequence_length": LENGTH, "objective": objective, "baseline": False}}
    if sources:
        meta["config"]["stage"]["data"] = dict.fromkeys(sources, 1.0)
        meta["config"]["sources"] = {name: as_dict(source) for name, source in sources.items()}
    with Checkpoints(workdir / STAGE / "checkpoints", keep=9) as checkpoints:
        checkpoints.save(step, params, {}, meta)


def written(
    directory, form="merged", *, labels=(), name="out", step="latest", base=None, dtype="float32", run=None, **changes
):
    """The directory that a model with `changes` is exported to. run: other arguments of `write_run`."""
    workdir, to = directory / "run", directory / name
    if not workdir.exists():
        write_run(workdir, *model(**changes), labels, **(run or {}))
    assert export(workdir, STAGE, to, form, step, base, dtype) == 0
    return to


def tensors(path) -> dict[str, np.ndarray]:
    return load_file(path)

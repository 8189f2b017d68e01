"""The model that the stages of a run share, and which of its heads mean something."""

import functools
import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from llm3.config.data_schema import TokenizerConfig
from llm3.config.model_schema import ModelConfig
from llm3.config.schema import RunConfig
from llm3.data.tokenizer import Tokenizer
from llm3.data.tokenizer_files import tokenizer_file
from llm3.errors import UserError
from llm3.files import INIT, TOKENIZER, local_path
from llm3.handoff.checkpoint import find_checkpoint
from llm3.handoff.pretrained import described
from llm3.handoff.start import ModelStart, Start, read_start
from llm3.models.transformer import abstract
from llm3.registry import declared
from llm3.segments import canonical
from llm3.stages.parents import origin, parent_name
from llm3.tree import flatten


def init_model(config: RunConfig, vocab_size: int) -> ModelConfig:
    """The model before any stage: without adapters or a task head."""
    return replace(config.model, vocab_size=vocab_size, classes=0)


def planned_vocabulary(config: RunConfig, workdir: Path) -> int:
    """`vocabulary_size` as far as it is known without data: also from the tokenizer of the run to start from."""
    rows, tokenizer = config.model.vocab_size, config.tokenizer
    start = None if rows or tokenizer.path or tokenizer.sources else origin(config, workdir)
    if start is not None and isinstance(start[1], Start) and (file := start[1].run / TOKENIZER).is_file():
        tokenizer = replace(tokenizer, path=str(file))
    return rows + len(tokenizer.add) if rows else planned_size(tokenizer)


def planned_size(config: TokenizerConfig) -> int:
    """The size of a run's vocabulary as far as the config tells: that of the file at `path`, if it exists already."""
    path = local_path(config.path, "config.tokenizer.path") if config.path else Path()
    if not config.path or not path.exists():
        return config.vocab_size + len(config.add)
    path = tokenizer_file(path)
    return _size_of(path, path.stat().st_mtime_ns, json.dumps(config.special)) + len(config.add)


@functools.lru_cache
def _size_of(path: Path, modified: int, special: str) -> int:
    return Tokenizer.load(path, json.loads(special)).vocab_size


def vocabulary_size(config: RunConfig, tokenizer: Tokenizer) -> int:
    """The rows of the embedding: one per token, and the spare ones of the model that the run starts from.

    Raises UserError for a tokenizer that has more tokens than that model has rows, besides those of `tokenizer.add`.
    """
    rows, tokens = config.model.vocab_size, tokenizer.vocab_size
    if rows and (known := tokens - len(config.tokenizer.add)) > rows:
        raise UserError(
            f"config.tokenizer: the tokenizer has {known:,} tokens, but the model to start from has an embedding of "
            f"{rows:,} rows: use the tokenizer of that model"
        )
    return max(rows, tokens)


def has_lm_head(config: RunConfig, name: str, workdir: Path, model: ModelConfig) -> bool:
    """Whether a stage ends with an LM head that means something: one that it or an ancestor trained.

    A stage without a trained ancestor has one too, as untrained as the rest of the model. Raises UserError.
    """
    stage, where = config.stages[name], f"config.stages.{name}.start"
    if not declared("objectives", stage.objective_name).HEAD:
        return True
    if (parent := parent_name(stage)) in config.stages:
        return has_lm_head(config, parent, workdir, model)
    start = read_start(stage.start, workdir, where)
    if isinstance(start, ModelStart):
        return has_lm_leaves(described(start, workdir, where).leaves, model)
    if start is None or start.stage == INIT:
        return True
    return find_checkpoint(start, where).meta.get("lm_head", True)


def has_lm_leaves(leaves: Collection[str], model: ModelConfig) -> bool:
    """Whether a pretrained model with these leaves has all that its LM head needs."""
    needed = flatten(canonical(abstract(replace(model, classes=0, adapters=())).shapes))
    return needed.keys() <= set(leaves)

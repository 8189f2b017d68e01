"""Answers to prompts and dialogues, written as the stage was trained; or the continuation of a text.

A stage that was trained with a chat template takes a text for the user's turn. Of a prompt that is too long, the last
tokens are read.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from llm3.config.sampling import Sampling
from llm3.data.formats import Document
from llm3.errors import at_least
from llm3.evals.generation import Question, generate_answers
from llm3.predict.fields import Fields
from llm3.predict.session import Item, Session
from llm3.predict.trained import Trained

FORMATS = ("dialogue", "choice", "text")
ROWS = 256


@dataclasses.dataclass(frozen=True)
class Options:
    """max_tokens: the longest answer. seed: of draws, together with the row. Other fields as of `Sampling`."""

    max_tokens: int = 64
    seed: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        at_least("max_tokens", self.max_tokens, 1)
        self.sampling.check()

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        return Sampling(*(getattr(self, name) for name in Sampling._fields))


def least_length(options: Options) -> int:
    """The answer, and two tokens for the prompt."""
    return options.max_tokens + 2


def refusal(trained: Trained) -> str:
    """Only a causal model with an LM head writes."""
    if not trained.model.causal:
        return "it is a bidirectional model"
    return "" if trained.lm_head else "its LM head is untrained"


def read(row: dict[str, Any], fields: Fields) -> dict[str, Any]:
    """The turns before the answer, or the text. Raises BadRow."""
    return fields.plugin.read_input(row, fields.source)


def encode(record: dict[str, Any], fields: Fields, trained: Trained, tokenizer: Any, options: Options) -> Document:
    """The tokens up to where the answer begins."""
    return fields.plugin.encode_prompt(record, tokenizer, trained.template)


def columns(trained: Trained, options: Options) -> dict[str, pa.DataType]:
    """answer; tokens (their number); truncated: only the last tokens of the prompt were read."""
    return {"answer": pa.string(), "tokens": pa.int64(), "truncated": pa.bool_()}


def predict(session: Session, items: Sequence[Item]) -> list[dict[str, Any]]:
    """The answer to each prompt."""
    options, tokenizer = session.options, session.tokenizer
    width = session.length - options.max_tokens
    questions = []
    for each in items:
        tokens, note = each.document.tokens.tolist(), each.document.note or {}
        starts, long = len(tokenizer.starts), len(tokens) > width
        kept = [*tokens[:starts], *tokens[len(tokens) - width + starts :]] if long else tokens
        questions.append(Question(kept, [], note.get("end", [tokenizer.eos_id]), note.get("lead", ""), long))
    seeds = [seed_of(options.seed, each.row) for each in items] if options.temperature else None
    context = session.context(items, "")
    found = generate_answers(context, questions, width, sampling=options.sampling, seeds=seeds)
    return [
        {"answer": each.text, "tokens": each.tokens, "truncated": question.truncated}
        for each, question in zip(found, questions, strict=True)
    ]


def seed_of(seed: int, row: int) -> int:
    """The seed of a row: below 2**31."""
    digest = hashlib.sha256(f"{seed}/{row}".encode()).digest()
    return int(np.frombuffer(digest[:4], "<u4")[0]) >> 1

"""Dialogues in memory, as a token cache holds them."""

import numpy as np

from llm3.config.data_schema import SourceConfig
from llm3.data import formats
from llm3.registry import load_plugin
from tests.helpers.tiny_cache import MemoryCache

DIALOGUE = SourceConfig("x", prompt="question", answer="answer")
TALK = SourceConfig("x", messages="messages")


class AnswerCache(MemoryCache):
    """A MemoryCache with answer masks."""

    def answer_mask(self, index: int) -> np.ndarray:
        labelled = self._documents[index].answer_mask
        return np.ones(len(self.document(index)), bool) if labelled is None else labelled


def encoded(row: dict, source: SourceConfig, tokenizer, template: str = ""):
    """A row as a document."""
    row_format = load_plugin(formats, source.row_format)
    return row_format.encode(row_format.read_row(row, source), tokenizer, template)


def questions(pairs, tokenizer) -> AnswerCache:
    """A cache of (question, answer) rows."""
    rows = [{"question": question, "answer": answer} for question, answer in pairs]
    return AnswerCache([encoded(row, DIALOGUE, tokenizer) for row in rows])


def runs(document) -> list[list[int]]:
    """The tokens of each run of the answer mask."""
    edges = np.flatnonzero(np.diff(np.pad(document.answer_mask.astype(int), 1)))
    return [document.tokens[a:b].tolist() for a, b in edges.reshape(-1, 2)]

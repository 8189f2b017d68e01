"""Extractive reading comprehension: a question, a context, and the answers with their offsets, as in SQuAD.

Rajpurkar et al. 2016 (SQuAD), 2018 (questions without an answer), Cui et al. 2019 (CMRC 2018, the same in Chinese).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from llm3.config.data_schema import SourceConfig
from llm3.data.formats import BadRow, Document, bytes_of, structure, text_of
from llm3.data.tokenizer import Tokenizer


def read_row(row: Mapping[str, Any], source: SourceConfig) -> dict[str, Any]:
    """{"question", "context", "answers": [[text, first character], ...]}; unanswerable questions have no answers.

    The column of answers holds {"text": [...], "answer_start": [...]}, or a list of {"text", "answer_start"}. Raises
    BadRow, also for an answer that is not at its offset.
    """
    question, context = text_of(row, source.prompt), text_of(row, source.text)
    answers = _pairs(structure(row, source.answers), source.answers)
    for text, start in answers:
        if start < 0 or context[start : start + len(text)] != text:
            raise BadRow("answer is not at its offset")
    return {"question": question, "context": context, "answers": [list(each) for each in answers]}


def read_input(row: Mapping[str, Any], source: SourceConfig) -> dict[str, Any]:
    """As `read_row`, without answers. Raises BadRow."""
    return {"question": text_of(row, source.prompt), "context": text_of(row, source.text), "answers": []}


def columns(source: SourceConfig) -> list[str]:
    """The fields of the question and of the context."""
    return [source.prompt, source.text]


def _pairs(answers: Any, name: str) -> list[tuple[str, int]]:
    """(text, first character) of each answer. Raises BadRow."""
    try:
        if isinstance(answers, Mapping):
            pairs = list(zip(answers["text"], answers["answer_start"], strict=True))
        else:
            pairs = [(each["text"], each["answer_start"]) for each in answers]
    except (KeyError, TypeError, ValueError):
        raise BadRow(f"{name} is not like {{text: [...], answer_start: [...]}}") from None
    for text, start in pairs:
        if not isinstance(text, str) or not isinstance(start, int) or isinstance(start, bool):
            raise BadRow(f"{name} holds values other than texts and integers")
        if not text.strip():
            raise BadRow(f"{name} holds an empty text")
    return pairs


def encode(record: Mapping[str, Any], tokenizer: Tokenizer, template: str) -> Document:
    """[bos] question [eos] context [eos], without the first if the tokenizer has no bos.

    note: "answers", their texts; "spans", the distinct [first token, last token] in order, the fewest tokens of the
    document that cover an answer; "context", the index of the first token of the context.
    """
    del template
    question, context = tokenizer.encode(record["question"]), tokenizer.encode_spans([record["context"]])
    first = len(tokenizer.starts) + len(question) + 1
    spans: list[list[int]] = []
    for text, start in record["answers"]:
        begins = np.searchsorted(context.ends, start, side="right")
        ends = np.searchsorted(context.starts, start + len(text) - 1, side="right") - 1
        if (span := [int(first + begins), int(first + max(begins, ends))]) not in spans:
            spans.append(span)
    tokens = [*tokenizer.starts, *question, tokenizer.eos_id, *context.ids, tokenizer.eos_id]
    note = {"answers": [text for text, _ in record["answers"]], "spans": spans, "context": first}
    return Document(np.array(tokens, np.int32), None, bytes_of(texts(record)), note=note)


def texts(record: Mapping[str, Any]) -> list[str]:
    """The question and the context."""
    return [record["question"], record["context"]]

"""Answers that are no continuation: scores, classes, masked tokens, spans and embeddings.

All are made in the engine's thread. All but the scores are predictions of `llm3.predict`, for rows of a request.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm3.config.data_schema import SourceConfig
from llm3.data.tokenizer import Tokenizer
from llm3.evals import Compiled
from llm3.evals.perplexity import bits_per_byte
from llm3.models.decoding import Scores
from llm3.predict import kinds
from llm3.predict.fields import Fields
from llm3.predict.run import Kind, predict_rows
from llm3.predict.session import Session
from llm3.registry import load_plugin
from llm3.serve.errors import ApiError
from llm3.serve.requests import MOST_ALTERNATIVES
from llm3.serve.scoring import score
from llm3.serve.stages import Served
from llm3.serve.text import token_name

ROWS = 8  # windows of a batch, if there are several texts
SHOWN = 5  # alternatives of each token of a scored text
TEXT = ("text", SourceConfig(path="json", data_files="-", text="text"))
SPAN = ("span", SourceConfig(path="json", data_files="-", text="context", prompt="question", answers="answers"))


class Asked(NamedTuple):
    """A kind of predictions with its options, and the field of the body that a row without a prediction is due to."""

    kind: str
    options: dict[str, Any]
    field: str


LABELS = Asked("labels", {"probabilities": True}, "text")
PROPOSALS = Asked("proposals", {"top_k": MOST_ALTERNATIVES}, "text")
SPANS = Asked("spans", {}, "context")
EMBEDDINGS = Asked("embeddings", {}, "input")
_compiled: Compiled = {}


def _predicted(stage: Served, asked: Asked, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The predictions for the rows. Raises ApiError for a row that has none."""
    plugin = load_plugin(kinds, asked.kind)
    options = plugin.Options(**asked.options) if asked.options or hasattr(plugin, "Options") else None
    row_format, source = SPAN if asked.kind == "spans" else TEXT
    session = Session(
        trained=stage.trained,
        fields=Fields(row_format, source, "", []),
        options=options,
        params=stage.leaves,
        model=stage.model,
        place=functools.partial(jax.tree.map, jnp.asarray),
        compiled=_compiled,
        batch_size=1 if len(rows) == 1 else ROWS,
        length=stage.trained.length,
    )
    found = predict_rows(session, Kind(asked.kind, plugin, options), list(rows), 0, [])
    for number, each in enumerate(found):
        if each["error"] is not None:
            which = f"[{number}]" if len(rows) > 1 else ""
            raise ApiError(f"{asked.field}{which}: {each['error']}", asked.field)
    return found


def classify(stage: Served, texts: Sequence[str]) -> list[dict[str, Any]]:
    """For each text, all labels with their probabilities, the likeliest first, and those that are predicted."""
    results = []
    for found in _predicted(stage, LABELS, [{"text": text} for text in texts]):
        shares = sorted(found["probabilities"].items(), key=lambda pair: -(pair[1] or 0.0))
        predicted = found["labels"] if stage.trained.several_labels else [found["label"]]
        labels = [{"label": label, "probability": share} for label, share in shares]
        results.append({"labels": labels, "predicted": predicted, "truncated": found["truncated"]})
    return results


def fill(stage: Served, text: str, top_k: int) -> list[list[dict[str, Any]]]:
    """For each mask token of the text, its likeliest tokens with their probabilities."""
    (found,) = _predicted(stage, PROPOSALS, [{"text": text}])
    return [proposals[:top_k] for proposals in found["proposals"]]


def spans(stage: Served, question: str, context: str) -> dict[str, Any]:
    """The answer to the question in the context, with its characters there; "": there is none."""
    (found,) = _predicted(stage, SPANS, [{"question": question, "context": context}])
    return {name: found[name] for name in ("answer", "start", "end", "score")}


def embed(stage: Served, texts: Sequence[str]) -> list[list[float]]:
    """The mean of the final hidden states of each text. Raises ApiError for a text that a window cannot hold."""
    found = _predicted(stage, EMBEDDINGS, [{"text": text} for text in texts])
    for number, each in enumerate(found):
        if each["truncated"]:
            raise ApiError(f"input[{number}]: it has more than the {stage.trained.length} tokens of a window", "input")
    return [each["embedding"] for each in found]


def pieces(stage: Served, tokens: Sequence[int]) -> list[Sequence[int]]:
    """A text cut into windows of the stage's length, as the evaluation `perplexity` cuts it. A window sees no other.

    Each piece also has the last token of the piece before, which predicts its first one.
    """
    length = stage.trained.length
    return [tokens[first : first + length + 1] for first in range(0, max(1, len(tokens) - 1), length)]


def score_pieces(stage: Served, pieces: Sequence[Sequence[int]]) -> list[Scores]:
    """The scores of each piece."""
    return [score(stage, each) for each in pieces]


def scored(tokenizer: Tokenizer, text: str, scores: Sequence[Scores]) -> dict[str, Any]:
    """The response of /score. scores: of each of the `pieces` of <bos> and the text."""
    found = tokenizer.encode_spans([text])
    first = 0 if tokenizer.starts else 1  # tokens that nothing predicts
    logprobs = [None] * first + np.concatenate([each.logprobs for each in scores]).tolist()
    likeliest = [[]] * first + np.concatenate([each.likeliest for each in scores])[:, :SHOWN].tolist()
    theirs = [[]] * first + np.concatenate([each.their_logprobs for each in scores])[:, :SHOWN].tolist()
    tokens, nats, at = [], 0.0, 0
    for place, token in enumerate(found.ids):
        start, at = max(found.starts[place], at), max(found.ends[place], at)
        own = logprobs[place]
        if own is not None and tokenizer.is_text[token]:
            nats -= own
        pairs = zip(likeliest[place], theirs[place], strict=True)
        top = [{"text": token_name(tokenizer, other), "logprob": _number(value)} for other, value in pairs]
        part = {"text": text[start:at], "start": start, "end": at, "logprob": _number(own), "top": top}
        tokens.append(part)
    size = len(text.encode()) - (tokenizer.first_bytes(text, found.ids) if first else 0)
    bits = bits_per_byte(nats, size) if size > 0 else None
    return {"bits_per_byte": _number(bits), "nats": _number(nats), "bytes": size, "tokens": tokens}


def _number(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None

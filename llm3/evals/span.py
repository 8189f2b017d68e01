"""Extractive reading comprehension: exact match and F1 of the best span of each document.

The best span of a document has at most `max_answer_tokens` and the highest sum of start and end logit over all chunks.
It is the answer unless <bos> ("no answer here") has a higher sum (Devlin et al. 2019, section 4.3).
"""

import dataclasses
import difflib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from llm3.data.batch import Batch
from llm3.errors import UserError, nearest
from llm3.evals import EvalContext, by_item
from llm3.evals.generation import normalised, token_f1, words
from llm3.models.transformer import Transformer
from llm3.objectives.span import span_logits

WINDOWS = {"span": "spans"}
HEAD = ("start", "end")
CAUSAL = None
BETTER = {"exact_match": "higher", "f1": "higher"}
EXAMPLES = 5  # predictions in the report

CHINESE = "\u4e00-\u9fa5"  # Chinese characters, as in the script of CMRC 2018
CMRC_PUNCTUATION = str.maketrans("", "", "-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")  # noqa: RUF001


def squad_exact(prediction: str, reference: str) -> float:
    """1 if the texts are equal but for case, punctuation and articles (Rajpurkar et al. 2016), else 0."""
    return float(normalised(prediction) == normalised(reference))


def squad_f1(prediction: str, reference: str) -> float:
    """The harmonic mean of precision and recall of the words, each counted as often as it occurs."""
    return token_f1(words(prediction), words(reference))


def cmrc_plain(text: str) -> str:
    """An answer in lower case, without the punctuation that CMRC 2018 ignores."""
    return text.lower().strip().translate(CMRC_PUNCTUATION)


def cmrc_segments(text: str) -> list[str]:
    """Chinese characters one by one, and the words, numbers and marks between them."""
    return re.findall(rf"[{CHINESE}]|[^\W{CHINESE}]+(?:[.'][^\W{CHINESE}]+|,\d+)*|[^\w\s]|_", cmrc_plain(text))


def cmrc_exact(prediction: str, reference: str) -> float:
    """1 if the texts are equal but for case and punctuation (Cui et al. 2019), else 0."""
    return float(cmrc_plain(prediction) == cmrc_plain(reference))


def cmrc_f1(prediction: str, reference: str) -> float:
    """F1 of the longest run of segments that both texts contain, as in the evaluation script of CMRC 2018.

    That script splits words between Chinese characters with NLTK, which also splits English contractions ("do|n't").
    """
    found, expected = cmrc_segments(prediction), cmrc_segments(reference)
    if not found or not expected:
        return float(found == expected)
    common = difflib.SequenceMatcher(None, found, expected, autojunk=False).find_longest_match().size
    return 2 * common / (len(found) + len(expected))


class Rules(NamedTuple):
    """How to compare a prediction with a reference: two functions (prediction, reference) -> score from 0 to 1."""

    exact: Callable[[str, str], float]
    f1: Callable[[str, str], float]

    def best(self, prediction: str, references: list[str]) -> tuple[float, float]:
        """Exact match and F1 with the nearest reference. No references: there is no answer, and "" is right."""
        references = references or [""]
        exact, f1 = (max(score(prediction, reference) for reference in references) for score in self)
        return exact, f1


RULES = {"squad": Rules(squad_exact, squad_f1), "cmrc2018": Rules(cmrc_exact, cmrc_f1)}


@dataclasses.dataclass(frozen=True)
class Options:
    """rules: how to compare texts, "squad" (words between spaces) or "cmrc2018". max_answer_tokens: max tokens of a
    span. no_answer_threshold: predict "no answer" if its score exceeds that of the best span by more than this;
    infinite: always predict a span."""

    rules: str = "squad"
    max_answer_tokens: int = 64
    no_answer_threshold: float = 0.0

    def __post_init__(self) -> None:
        if self.rules not in RULES:
            raise UserError(f"rules={self.rules!r}: {nearest(self.rules, RULES)}")
        if self.max_answer_tokens < 1:
            raise UserError(f"max_answer_tokens={self.max_answer_tokens!r}: expected at least 1")


def logits(model: Transformer, batch: Batch) -> dict[str, jax.Array]:
    """Start and end logits of each position: float32 [B, T, 2]."""
    return {"logits": span_logits(model, batch)}


def best_span(starts: np.ndarray, ends: np.ndarray, max_tokens: int) -> tuple[float, int, int]:
    """(score, first, last) of the best span of at most `max_tokens` positions. starts, ends: logits [n]."""
    following = np.pad(ends, (0, max_tokens - 1), constant_values=-np.inf)
    scores = starts[:, None] + np.lib.stride_tricks.sliding_window_view(following, max_tokens)
    first, more = divmod(int(scores.argmax()), max_tokens)
    return float(scores[first, more]), first, first + more


class Found(NamedTuple):
    """The best span of a document: first and last token, its score, and that of "no answer". No window: -inf, inf."""

    score: float
    first: int
    last: int
    none: float

    def answers(self, threshold: float) -> bool:
        """Whether the span is predicted, and not "no answer"."""
        return self.none - self.score <= threshold


def best_spans(context: EvalContext) -> list[Found]:
    """The best span of each document, over all of its chunks."""
    table = context.table()
    best = [(-np.inf, 0, 0)] * context.cache.documents
    none = np.full(context.cache.documents, np.inf)
    for number, (batch, result) in enumerate(context.each(logits, table=table)):
        for row, segment, document, (first, stop) in context.pieces(table, number * context.config.batch_size):
            bos, *_, eos = np.flatnonzero(batch.segments[row] == segment)
            starts, ends = result["logits"][row, eos - (stop - first) : eos].T
            score, start, end = best_span(starts, ends, context.options.max_answer_tokens)
            best[document] = max(best[document], (score, first + start, first + end))
            none[document] = min(none[document], float(result["logits"][row, bos].sum()))
    return [Found(*each, float(no)) for each, no in zip(best, none, strict=True)]


def predictions(context: EvalContext) -> list[str]:
    """The predicted answer of each document; "": no answer."""
    answers = []
    for document, found in enumerate(best_spans(context)):
        tokens = context.cache.document(document)[found.first : found.last + 1]
        text = context.tokenizer.decode(tokens) if found.answers(context.options.no_answer_threshold) else ""
        answers.append(text.strip("\ufffd"))  # a token may end within a character
    return answers


def evaluate(context: EvalContext) -> dict[str, Any]:
    """exact_match and f1: for each document the best over its references, then the mean; items: number of documents.

    A document whose question is too long for the windows counts as predicted "no answer". If some questions have no
    answer, no_answer has their share, the predicted share and their exact match; answerable has the metrics of the
    others. examples: the first few predictions.
    """
    notes = context.notes()
    found, rules = predictions(context), RULES[context.options.rules]
    scores = np.array([rules.best(text, note["answers"]) for text, note in zip(found, notes, strict=True)])
    exact, f1 = scores.mean(axis=0).tolist()
    details: dict[str, Any] = {
        "examples": [_example(context, document, notes[document], found[document]) for document in _first(notes)]
    }
    unanswerable = np.array([not note["answers"] for note in notes])
    if unanswerable.any():
        details["no_answer"] = {
            "share": float(unanswerable.mean()),
            "predicted": float(np.mean([not text for text in found])),
            "exact_match": float(scores[unanswerable, 0].mean()),
        }
        if not unanswerable.all():
            answered = zip(("exact_match", "f1"), scores[~unanswerable].mean(axis=0).tolist(), strict=True)
            details["answerable"] = dict(answered)
    columns: dict[str, Any] = {
        "truth": [next(iter(note["answers"]), "") for note in notes],
        "references": [list(note["answers"]) for note in notes],
        "prediction": found,
        "score": scores[:, 0],
        "f1": scores[:, 1],
    }
    return {"exact_match": exact, "f1": f1, "items": len(notes), **details} | {
        "predictions": by_item(columns, context.cache.rows)
    }


def _first(notes: list[Any]) -> range:
    return range(min(EXAMPLES, len(notes)))


def _example(context: EvalContext, document: int, note: dict[str, Any], prediction: str) -> dict[str, Any]:
    question = context.tokenizer.decode(context.cache.document(document)[context.cache.starts : note["context"] - 1])
    return {"question": question, "answers": note["answers"], "prediction": prediction}

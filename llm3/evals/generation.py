"""Answers that the model generates greedily, compared with references: exact match, token F1 and ROUGE-L.

Texts are compared as SQuAD does (Rajpurkar et al. 2016, the official script): lower case, without punctuation, articles
and superfluous white space. East Asian punctuation is removed as well. In scripts without spaces between words, each
character is a token (as in Cui et al. 2019, CMRC 2018, for Chinese).
"""

import collections
import dataclasses
import functools
import re
import string
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from llm3.config.sampling import GREEDY, Sampling
from llm3.data.chat_templates import without_lead
from llm3.errors import UserError, at_least
from llm3.evals import EvalContext, by_item
from llm3.models.batching import Decoder, Request, Shape, padded_width, stop_sizes
from llm3.models.sampling import needs_of

WINDOWS = {"dialogue": "dialogue", "choice": "dialogue"}
HEAD = ""
CAUSAL = True
BETTER = {"exact_match": "higher", "f1": "higher", "rouge_l": "higher"}

EXAMPLES, EXAMPLE_CHARACTERS = 5, 300
PUNCTUATION = re.compile(f"[{re.escape(string.punctuation)}\\u3001-\\u303f\\u30fb\\uff01-\\uff0f\\uff1a-\\uff65]")
ARTICLES = re.compile(r"\b(a|an|the)\b")
# Thai, Lao, Myanmar, Khmer; Kana, Han
WITHOUT_SPACES = re.compile(
    "([\\u0e00-\\u0eff\\u1000-\\u109f\\u1780-\\u17ff\\u3040-\\u30ff\\u3400-\\u9fff\\uf900-\\ufaff\\U00020000-\\U0003ffff])"
)


@dataclasses.dataclass(frozen=True)
class Options:
    """max_tokens: the length at which generation of an answer stops if the model does not end it."""

    max_tokens: int = 64

    def __post_init__(self) -> None:
        at_least("max_tokens", self.max_tokens, 1)


class Question(NamedTuple):
    """A prompt (tokens) and its references. end: tokens that end an answer. lead: text before an answer."""

    prompt: list[int]
    references: list[str]
    end: list[int]
    lead: str
    truncated: bool


def evaluate(context: EvalContext) -> dict[str, Any]:
    """exact_match, f1 and rouge_l, from 0 to 1: for each item the best over its references, then the mean over items.

    majority_exact_match: exact match of always giving the answer that is right most often in this set. items: their
    number. truncated: the number of prompts of which only the last tokens fit. examples: the first few answers.
    """
    width = context.config.sequence_length - context.options.max_tokens
    if width < 2:
        raise UserError(
            f"evaluation 'generation': sequence_length={context.config.sequence_length}: expected max_tokens="
            f"{context.options.max_tokens} and at least 2 for the prompt"
        )
    questions = [read_question(context, index, width) for index in range(context.cache.documents)]
    answers = [each.text for each in generate_answers(context, questions, width)]
    right = collections.Counter(text for each in questions for text in {normalised(text) for text in each.references})
    scores = [score(text, each.references) for text, each in zip(answers, questions, strict=True)]
    means = {name: float(np.mean([each[name] for each in scores])) for name in scores[0]}
    shown = [
        {
            "prompt": context.tokenizer.decode(each.prompt)[-EXAMPLE_CHARACTERS:],
            "answer": each.references[0][:EXAMPLE_CHARACTERS],
            "generated": text[:EXAMPLE_CHARACTERS],
        }
        for text, each in list(zip(answers, questions, strict=True))[:EXAMPLES]
    ]
    return means | {
        "majority_exact_match": max(right.values()) / len(questions),
        "items": len(questions),
        "truncated": sum(each.truncated for each in questions),
        "examples": shown,
        "predictions": by_item(_columns(questions, answers, scores), context.cache.rows),
    }


def _columns(questions: list[Question], answers: list[str], scores: list[dict[str, float]]) -> dict[str, Any]:
    """Columns of predictions; `score` is the exact match."""
    metrics = {name: np.array([each[name] for each in scores]) for name in scores[0]}
    return {
        "truth": [each.references[0] for each in questions],
        "references": [each.references for each in questions],
        "prediction": answers,
        "score": metrics.pop("exact_match"),
        **metrics,
    }


def read_question(context: EvalContext, index: int, width: int) -> Question:
    """A document as a question: the prompt, before its last answer, keeps <bos> and up to `width` - 1 last tokens."""
    tokens, labelled = context.cache.document(index).tolist(), np.asarray(context.cache.answer_mask(index))
    note = context.cache.note(index) or {}
    stop = int(np.flatnonzero(labelled)[-1]) + 1
    before = np.flatnonzero(~labelled[:stop])
    start = int(before[-1]) + 1
    end, lead = note.get("end", [context.tokenizer.eos_id]), note.get("lead", "")
    answer = without_lead(lead, context.tokenizer.decode(tokens[start : stop - len(end)]))
    starts = context.cache.starts
    prompt = tokens[:start] if start <= width else [*tokens[:starts], *tokens[start - width + starts : start]]
    return Question(prompt, note.get("references", [answer]), end, lead, start > width)


class Answer(NamedTuple):
    """An answer: its text, and the number of its tokens, without those that ended it."""

    text: str
    tokens: int


def generate_answers(
    context: EvalContext,
    questions: list[Question],
    width: int,
    *,
    sampling: Sampling = GREEDY,
    seeds: Sequence[int] | None = None,
) -> list[Answer]:
    """The model's answer to each question. width: max tokens of a prompt. seeds: of each answer, if it is drawn."""
    draws = seeds or [0] * len(questions)
    most, ends = context.options.max_tokens, [[end] for end in context.tokenizer.end_ids]
    asked = [
        Request(each.prompt, most, [*ends, each.end], seed, sampling)
        for each, seed in zip(questions, draws, strict=True)
    ]
    made = generate_tokens(context, asked, width)
    texts = (
        without_lead(each.lead, context.tokenizer.decode(tokens)) for each, tokens in zip(questions, made, strict=True)
    )
    return [Answer(text, len(tokens)) for text, tokens in zip(texts, made, strict=True)]


def generate_tokens(
    context: EvalContext,
    requests: Sequence[Request],
    width: int,
    *,
    unit: str = "documents",
    steps: int = 0,
    ended: Callable[[int, list[int]], bool] | None = None,
) -> list[list[int]]:
    """The tokens of the answer to each request, without the stop that ended it.

    width: max tokens of a prompt. unit: of the count that is shown. ended(number of the request, tokens so far):
    whether an answer is complete already, asked every `steps` tokens.
    """
    made: list[list[int]] = [[] for _ in requests]
    groups: dict[tuple[int, int], list[int]] = collections.defaultdict(list)
    for number, each in enumerate(requests):  # by the request's own lengths only
        groups[padded_width(len(each.prompt), width), padded_width(each.limit)].append(number)
    jit, segments = functools.partial(context.jit, stateful=True), ((0, context.model.layers),)
    with context.counting(len(requests), unit) as advance:
        for (padded, most), numbers in sorted(groups.items()):
            penalties = needs_of(requests[number].sampling for number in numbers).penalises
            shape = Shape(context.config.batch_size, padded, most, stop_sizes(requests), penalties=penalties)
            decoder = Decoder(jit, context.place, context.model, segments, shape, steps)
            for number, tokens in decoder.answers([(number, requests[number]) for number in numbers], ended):
                made[number] = tokens
                advance(1)
    return made


def score(text: str, references: list[str]) -> dict[str, float]:
    """exact_match, f1 and rouge_l of one answer: for each metric the best over the references."""
    found, right = words(text), [words(each) for each in references]
    return {
        "exact_match": float(max(normalised(text) == normalised(each) for each in references)),
        "f1": max(token_f1(found, each) for each in right),
        "rouge_l": rouge_l(text, references),
    }


def normalised(text: str) -> str:
    """A text in the normal form in which it is compared."""
    return " ".join(ARTICLES.sub(" ", PUNCTUATION.sub("", text.lower())).split())


def words(text: str) -> list[str]:
    """The tokens of a normalised text."""
    return WITHOUT_SPACES.sub(r" \1 ", normalised(text)).split()


def token_f1(found: list[str], right: list[str]) -> float:
    """The harmonic mean of precision and recall of tokens, each counted as often as it occurs in both."""
    if not found or not right:
        return float(found == right)  # as SQuAD 2.0 does
    common = sum((collections.Counter(found) & collections.Counter(right)).values())
    return 2 * common / (len(found) + len(right))


def rouge_l(text: str, references: list[str]) -> float:
    """The F-measure of the longest common subsequence of tokens (Lin 2004, section 3.1), by rouge-score."""
    return _scorer().score_multi(references, text)["rougeL"].fmeasure


@functools.cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # importing it costs seconds (NLTK's stemmer)

    return RougeScorer(["rougeL"], tokenizer=_Words())


class _Words:
    """A tokenizer for rouge-score."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)

"""The bodies of requests, read and checked: types, ranges and names. What needs a stage is checked by `asks`."""

import secrets
from typing import Any, NamedTuple

from llm3.config.sampling import Sampling
from llm3.serve.errors import ApiError
from llm3.serve.fields import Fields, are_tokens, check_text

MOST_ANSWERS = 128  # of a request: prompts x n
MOST_STOPS, LONGEST_STOP = 8, 256  # stop strings, and characters of one
MOST_MESSAGES = 256
MOST_TEXTS = 256  # to classify or to embed at once
MOST_ALTERNATIVES = 20
SEEDS = 2**63


class Decoding(NamedTuple):
    """How answers are made. max_tokens: None: not given. seed: of the first of `n` answers to a prompt.

    logprobs: the likeliest tokens of each place that are wanted; None: no log probabilities.
    """

    max_tokens: int | None
    sampling: Sampling
    seed: int
    n: int
    stops: tuple[str, ...]
    logprobs: int | None
    stream: bool
    include_usage: bool


class Completion(NamedTuple):
    """/v1/completions. prompts: texts, or tokens."""

    model: str
    prompts: list[str] | list[list[int]]
    echo: bool
    decoding: Decoding


class Chat(NamedTuple):
    """/v1/chat/completions. messages: not checked, but few."""

    model: str
    messages: list[Any]
    decoding: Decoding


class Embeddings(NamedTuple):
    """/v1/embeddings. base64: the numbers as the bytes of little-endian float32."""

    model: str
    texts: list[str]
    base64: bool


class Classify(NamedTuple):
    """/classify."""

    model: str
    texts: list[str]


class Score(NamedTuple):
    """/score."""

    model: str
    text: str


class Fill(NamedTuple):
    """/fill. top_k: proposals for each mask token."""

    model: str
    text: str
    top_k: int


class Spans(NamedTuple):
    """/spans."""

    model: str
    question: str
    context: str


def read_completion(body: dict[str, Any]) -> Completion:
    """Raises ApiError."""
    fields = Fields(body)
    model, prompts, echo = fields.text("model"), _prompts(fields.take("prompt")), fields.flag("echo")
    if fields.take("suffix", "") != "":
        raise ApiError("suffix is not supported: a text is continued at its end", "suffix")
    logprobs = fields.integer("logprobs", None, 0, MOST_ALTERNATIVES)
    max_tokens = fields.integer("max_tokens", 16, 0, 2**31 - 1)
    found = Completion(model, prompts, echo, _decoding(fields, max_tokens, logprobs))
    if len(prompts) * found.decoding.n > MOST_ANSWERS:
        raise ApiError(f"{len(prompts)} prompts x n={found.decoding.n}: expected at most {MOST_ANSWERS} answers", "n")
    return found


def read_chat(body: dict[str, Any]) -> Chat:
    """Raises ApiError."""
    fields = Fields(body)
    model, messages = fields.text("model"), fields.take("messages")
    if not isinstance(messages, list) or not 1 <= len(messages) <= MOST_MESSAGES:
        raise ApiError(f"messages: expected a list of 1 to {MOST_MESSAGES} {{role, content}}", "messages")
    wanted, top = fields.flag("logprobs"), fields.integer("top_logprobs", None, 0, MOST_ALTERNATIVES)
    if top is not None and not wanted:
        raise ApiError("top_logprobs: expected logprobs=true as well", "top_logprobs")
    newer = fields.integer("max_completion_tokens", None, 1, 2**31 - 1)
    max_tokens = fields.integer("max_tokens", newer, 1, 2**31 - 1)
    return Chat(model, messages, _decoding(fields, max_tokens, (top or 0) if wanted else None))


def read_embeddings(body: dict[str, Any]) -> Embeddings:
    """Raises ApiError."""
    fields = Fields(body)
    model, texts = fields.text("model"), fields.texts("input", MOST_TEXTS)
    encoding = fields.text("encoding_format", "float")
    if encoding not in ("float", "base64"):
        raise ApiError("encoding_format: expected 'float' or 'base64'", "encoding_format")
    fields.end()
    return Embeddings(model, texts, encoding == "base64")


def read_score(body: dict[str, Any]) -> Score:
    """Raises ApiError."""
    fields = Fields(body)
    found = Score(fields.text("model"), fields.text("text"))
    fields.end()
    return found


def read_classify(body: dict[str, Any]) -> Classify:
    """Raises ApiError."""
    fields = Fields(body)
    found = Classify(fields.text("model"), fields.texts("text", MOST_TEXTS))
    fields.end()
    return found


def read_fill(body: dict[str, Any]) -> Fill:
    """Raises ApiError."""
    fields = Fields(body)
    model, text, top_k = fields.text("model"), fields.text("text"), fields.integer("top_k", 5, 1, MOST_ALTERNATIVES)
    fields.end()
    return Fill(model, text, top_k or 0)


def read_spans(body: dict[str, Any]) -> Spans:
    """Raises ApiError."""
    fields = Fields(body)
    found = Spans(fields.text("model"), fields.text("question"), fields.text("context"))
    fields.end()
    return found


def _decoding(fields: Fields, max_tokens: int | None, logprobs: int | None) -> Decoding:
    """All fields of a body that are left."""
    top_k = fields.integer("top_k", 0, -1, 2**31 - 1) or 0
    sampling = Sampling(
        temperature=fields.number("temperature", 1.0, 0.0, 100.0),
        top_k=max(0, top_k),  # other servers write -1 for all
        top_p=max(1e-6, fields.number("top_p", 1.0, 0.0, 1.0)),  # 0: only the likeliest token
        min_p=fields.number("min_p", 0.0, 0.0, 1.0),
        repetition_penalty=fields.number("repetition_penalty", 1.0, 0.01, 100.0),
    )
    seed = fields.integer("seed", None, -SEEDS, SEEDS - 1)
    n = fields.integer("n", 1, 1, MOST_ANSWERS) or 1
    stream, options = fields.flag("stream"), fields.take("stream_options", {})
    if not isinstance(options, dict):
        raise fields.wrong("stream_options", options, "an object")
    if options and not stream:
        raise ApiError("stream_options: expected stream=true as well", "stream_options")
    usage = Fields(options)
    include_usage = usage.flag("include_usage")
    usage.end(frozenset({"include_obfuscation"}))
    stops = _stops(fields.take("stop", []))
    fields.end()
    seed = secrets.randbits(31) if seed is None else seed
    return Decoding(max_tokens, sampling, seed, n, stops, logprobs, stream, include_usage)


def _stops(value: Any) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value
    if not (isinstance(values, list) and all(isinstance(each, str) for each in values)):
        raise ApiError("stop: expected a string or a list of strings", "stop")
    if len(values) > MOST_STOPS or any(len(each) > LONGEST_STOP for each in values):
        raise ApiError(f"stop: expected at most {MOST_STOPS} strings of at most {LONGEST_STOP} characters", "stop")
    return tuple(check_text(each, "stop") for each in values if each)


def _prompts(value: Any) -> list[str] | list[list[int]]:
    expected = "prompt: expected a string, a list of strings, a list of tokens, or a list of lists of tokens"
    if isinstance(value, str) or are_tokens(value):
        value = [value]
    if not (isinstance(value, list) and value):
        raise ApiError(expected, "prompt")
    if len(value) > MOST_ANSWERS:
        raise ApiError(f"prompt: expected at most {MOST_ANSWERS} prompts, not {len(value)}", "prompt")
    if all(isinstance(each, str) for each in value):
        return [check_text(each, "prompt") for each in value]
    if all(map(are_tokens, value)):
        return value
    raise ApiError(expected, "prompt")

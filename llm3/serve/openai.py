"""The shapes of OpenAI's responses: completions, chat completions and embeddings, whole and as events of a stream."""

import base64
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from llm3.data.tokenizer import Tokenizer
from llm3.serve.choices import Part, Token
from llm3.serve.errors import ApiError
from llm3.serve.fields import finite
from llm3.serve.text import token_name

DONE = "data: [DONE]\n\n"


class Head(NamedTuple):
    """What all parts of one response share. prompt_tokens: of all prompts. logprobs: as of `Decoding`."""

    id: str
    model: str
    created: int
    tokenizer: Tokenizer
    prompt_tokens: int
    logprobs: int | None
    chat: bool


def head(model: str, tokenizer: Tokenizer, prompt_tokens: int, logprobs: int | None, chat: bool) -> Head:
    """The head of a new response."""
    name = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
    return Head(name, model, int(time.time()), tokenizer, prompt_tokens, logprobs, chat)


async def whole(head: Head, parts: AsyncIterator[Part]) -> dict[str, Any]:
    """The response without a stream. Raises ApiError."""
    found: dict[int, Part] = {}
    async for part in parts:
        before = found.get(part.choice, Part(part.choice, "", []))
        joined = [*before.tokens, *part.tokens]
        found[part.choice] = part._replace(text=before.text + part.text, tokens=joined)
    shape = _chat_choice if head.chat else _choice
    choices = [shape(head, found[index]) for index in sorted(found)]
    kind = "chat.completion" if head.chat else "text_completion"
    usage = _usage(head, sum(each.made for each in found.values()))
    return _response(head, kind, choices) | {"usage": usage}


async def events(head: Head, parts: AsyncIterator[Part], include_usage: bool) -> AsyncIterator[str]:
    """The response as server-sent events. An error is an event too: the status is sent already."""
    kind, made, begun = "chat.completion.chunk" if head.chat else "text_completion", 0, set[int]()
    extra = {"usage": None} if include_usage else {}
    try:
        async for part in parts:
            made += part.made if part.finish else 0
            for choice in _chunks(head, part, begun):
                yield _event(_response(head, kind, [choice]) | extra)
    except ApiError as error:
        yield _event(error.body())
        return
    if include_usage:
        yield _event(_response(head, kind, []) | {"usage": _usage(head, made)})
    yield DONE


def _chunks(head: Head, part: Part, begun: set[int]) -> list[dict[str, Any]]:
    """The choices of the events for a part; begun: the chats whose role has been sent."""
    if not (part.text or part.tokens or part.finish):
        return []
    if not head.chat:
        return [_choice(head, part)]
    shared: dict[str, Any] = {"index": part.choice, "logprobs": None, "finish_reason": None}
    chunks = [] if part.choice in begun else [shared | {"delta": {"role": "assistant", "content": ""}}]
    begun.add(part.choice)
    if part.text or part.tokens:
        chunks.append(shared | {"delta": {"content": part.text}, "logprobs": _chat_logprobs(head, part.tokens)})
    if part.finish:
        chunks.append(shared | {"delta": {}, "finish_reason": part.finish})
    return chunks


def _choice(head: Head, part: Part) -> dict[str, Any]:
    logprobs = _logprobs(head, part.tokens)
    return {"index": part.choice, "text": part.text, "logprobs": logprobs, "finish_reason": part.finish or None}


def _chat_choice(head: Head, part: Part) -> dict[str, Any]:
    message = {"role": "assistant", "content": part.text, "refusal": None}
    logprobs = _chat_logprobs(head, part.tokens)
    return {"index": part.choice, "message": message, "logprobs": logprobs, "finish_reason": part.finish}


def _logprobs(head: Head, tokens: Sequence[Token]) -> dict[str, Any] | None:
    """Lists by token. top_logprobs has the token itself as well, also if it is none of the likeliest."""
    if head.logprobs is None:
        return None
    names = [token_name(head.tokenizer, each.token) for each in tokens]
    top: list[dict[str, float | None] | None] = []
    for name, each in zip(names, tokens, strict=True):
        if each.logprob is None:
            top.append(None)
            continue
        found: dict[str, float | None] = {}
        alternatives = zip(each.likeliest[: head.logprobs], finite(each.their_logprobs), strict=False)
        for token, logprob in alternatives:
            found.setdefault(token_name(head.tokenizer, token), logprob)
        found.setdefault(name, *finite([each.logprob]))
        top.append(found)
    return {
        "tokens": names,
        "token_logprobs": [None if each.logprob is None else finite([each.logprob])[0] for each in tokens],
        "top_logprobs": top,
        "text_offset": [each.offset for each in tokens],
    }


def _chat_logprobs(head: Head, tokens: Sequence[Token]) -> dict[str, Any] | None:
    """A list of tokens with their bytes: those of an incomplete character are known by them alone."""
    if head.logprobs is None:
        return None

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        written = head.tokenizer.token_bytes[token]
        name = token_name(head.tokenizer, token)
        return {"token": name, "logprob": finite([logprob or 0.0])[0], "bytes": list(written) or None}

    content = []
    for each in tokens:
        alternatives = list(zip(each.likeliest, each.their_logprobs, strict=True))[: head.logprobs]
        content.append(entry(each.token, each.logprob) | {"top_logprobs": [entry(*pair) for pair in alternatives]})
    return {"content": content, "refusal": None}


def embeddings(model: str, vectors: Sequence[Sequence[float]], as_base64: bool, tokens: int) -> dict[str, Any]:
    """The response of /v1/embeddings. tokens: of all texts."""
    encode: Callable[[Sequence[float]], Any] = _base64 if as_base64 else list
    data = [{"object": "embedding", "index": n, "embedding": encode(each)} for n, each in enumerate(vectors)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage}


def _base64(vector: Sequence[float]) -> str:
    return base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()


def _usage(head: Head, made: int) -> dict[str, int]:
    total = head.prompt_tokens + made
    return {"prompt_tokens": head.prompt_tokens, "completion_tokens": made, "total_tokens": total}


def _response(head: Head, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": head.id, "object": kind, "created": head.created, "model": head.model, "choices": choices}


def _event(content: dict[str, Any]) -> str:
    """In ASCII: some clients take more characters than "\\n" for the end of a line."""
    return f"data: {json.dumps(content)}\n\n"

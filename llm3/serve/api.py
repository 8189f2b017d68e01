"""The HTTP API: OpenAI's protocol for every stage, and what else stages can be asked."""

import asyncio
from collections.abc import Awaitable, Callable, Collection
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from llm3.serve import choices, metrics, openai, requests, tasks
from llm3.serve.answers import Answers, result
from llm3.serve.bodies import read_body, unless_gone
from llm3.serve.errors import ApiError, unknown_model
from llm3.serve.guard import LOOPBACK, Guard, error_response
from llm3.serve.service import Service
from llm3.serve.stages import Served

LONGEST_SCORED = 16_384  # tokens of a text for /score
MOST_CALLS = 32  # of the engine for one text, between which it decodes for others
Answering = Callable[[Answers, dict[str, Any]], Awaitable[Response]]


def create_app(
    service: Service, *, hosts: Collection[str] = LOOPBACK, key: str = "", routes: Collection[Route] = ()
) -> Starlette:
    """The application. hosts, key: see `Guard`. routes: more of them. `app.state.service` is the service."""
    counted = metrics.Metrics()
    answering: dict[str, Callable[[Service, Answers, dict[str, Any]], Awaitable[Response]]] = {
        "/v1/completions": _completions,
        "/v1/chat/completions": _chat,
        "/v1/embeddings": _embeddings,
        "/score": _score,
        "/classify": _classify,
        "/fill": _fill,
        "/spans": _spans,
    }
    read = {
        "/v1/models": lambda: JSONResponse({"object": "list", "data": service.models()}),
        "/health": lambda: _health(service),
        "/metrics": lambda: PlainTextResponse(counted.text(service.engine), media_type=metrics.TYPE),
    }
    paths = [*answering, *read, *(each.path for each in routes)]
    app = Starlette(
        routes=[
            *(
                Route(path, _answering(service, partial(each, service)), methods=["POST"])
                for path, each in answering.items()
            ),
            *(Route(path, _reading(each), methods=["GET"]) for path, each in read.items()),
            Route("/v1/models/{name:path}", partial(_model, service), methods=["GET"]),
            *routes,
        ],
        middleware=[Middleware(Guard, metrics=counted, hosts=hosts, key=key, paths=paths)],
        exception_handlers={ApiError: _on_error, HTTPException: _on_http_error},
    )
    app.state.service = service
    return app


def _answering(service: Service, answer: Answering) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint that answers the object in a body. What the engine has not completed when it ends is cancelled."""

    async def endpoint(request: Request) -> Response:
        answers = Answers(service.engine)
        streams = False
        try:
            body = await read_body(request)
            response = await unless_gone(request, answer(answers, body))
            streams = isinstance(response, _Events)
            return response
        except ClientDisconnect:
            return Response(status_code=499)
        finally:
            if not streams:
                answers.close()

    return endpoint


class _Events(StreamingResponse):
    """Server-sent events of answers, which end with the response."""

    def __init__(self, events: Any, answers: Answers):
        super().__init__(events, media_type="text/event-stream")
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.close()


def _reading(make: Callable[[], Response]) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(_: Request) -> Response:
        return make()

    return endpoint


async def _completions(service: Service, answers: Answers, body: dict[str, Any]) -> Response:
    asked = requests.read_completion(body)
    stage = service.stage(asked.model, "completions")
    given = await asyncio.to_thread(choices.completion_prompts, stage, asked.prompts)
    limit = choices.most_tokens(service, stage, given, asked.decoding.max_tokens, "prompt")
    return await _decoded(answers, asked.model, stage, given, limit, asked.decoding, asked.echo)


async def _chat(service: Service, answers: Answers, body: dict[str, Any]) -> Response:
    asked = requests.read_chat(body)
    stage = service.stage(asked.model, "chat")
    given = [await asyncio.to_thread(choices.chat_prompt, stage, asked.messages)]
    limit = choices.most_tokens(service, stage, given, asked.decoding.max_tokens, "messages")
    return await _decoded(answers, asked.model, stage, given, limit, asked.decoding, chat=True)


async def _decoded(
    answers: Answers,
    model: str,
    stage: Served,
    given: list[choices.Given],
    limit: int,
    decoding: requests.Decoding,
    echo: bool = False,
    chat: bool = False,
) -> Response:
    """The response with the answers to the given, as a whole or as events."""
    size = sum(len(each.prompt.tokens) for each in given)
    head = openai.head(model, stage.trained.tokenizer, size, decoding.logprobs, chat)
    parts = choices.begin(answers, stage, given, limit, decoding, echo)
    if decoding.stream:
        return _Events(openai.events(head, parts, decoding.include_usage), answers)
    return JSONResponse(await openai.whole(head, parts))


async def _embeddings(service: Service, answers: Answers, body: dict[str, Any]) -> Response:
    asked = requests.read_embeddings(body)
    stage = service.stage(asked.model, "embeddings")
    vectors = await result(answers.call(partial(tasks.embed, stage, asked.texts)))
    tokens = sum(map(len, await asyncio.to_thread(stage.trained.tokenizer.encode_batch, asked.texts)))
    return JSONResponse(openai.embeddings(asked.model, vectors, asked.base64, tokens))


async def _score(service: Service, answers: Answers, body: dict[str, Any]) -> Response:
    asked = requests.read_score(body)
    stage = service.stage(asked.model, "score")
    tokenizer = stage.trained.tokenizer
    tokens = [*tokenizer.starts, *await asyncio.to_thread(tokenizer.encode, asked.text)]
    if not asked.text or len(tokens) > LONGEST_SCORED:
        raise ApiError(f"text: expected 1 to {LONGEST_SCORED:,} tokens, not {len(tokens):,}", "text")
    pieces = tasks.pieces(stage, tokens)
    size = -(-len(pieces) // MOST_CALLS)
    calls = [
        answers.call(partial(tasks.score_pieces, stage, pieces[first : first + size]))
        for first in range(0, len(pieces), size)
    ]
    scores = [each for call in calls for each in await result(call)]
    return JSONResponse(await asyncio.to_thread(tasks.scored, tokenizer, asked.text, scores))


async def _classify(service: Service, answers: Answers, body: dict[str, Any]) -> Response:
    asked = requests.read_classify(body)
    stage = service.stage(asked.model, "classify")
    return JSONResponse({"results": await result(answers.call(partial(tasks.classify, stage, asked.texts)))})


async def _fill(service: Service, answers: Answers, body: dict[str, Any]) -> Response:
    asked = requests.read_fill(body)
    stage = service.stage(asked.model, "fill")
    return JSONResponse({"results": await result(answers.call(partial(tasks.fill, stage, asked.text, asked.top_k)))})


async def _spans(service: Service, answers: Answers, body: dict[str, Any]) -> Response:
    asked = requests.read_spans(body)
    stage = service.stage(asked.model, "spans")
    return JSONResponse(await result(answers.call(partial(tasks.spans, stage, asked.question, asked.context))))


async def _model(service: Service, request: Request) -> Response:
    name = request.path_params["name"]
    for each in service.models():
        if each["id"] == name:
            return JSONResponse(each)
    raise unknown_model(name, list(service.stages))


def _health(service: Service) -> Response:
    """503 while the server ends."""
    if service.engine.ending:
        return JSONResponse({"status": "ending"}, 503)
    return JSONResponse({"status": "ok"})


async def _on_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    """No such path, or not by this method."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path[:200]}"
    message = f"{what}: no such path" if error.status_code == 404 else f"{what}: {error.detail}"
    response = error_response(ApiError(message, status=error.status_code))
    response.headers.update(error.headers or {})
    return response

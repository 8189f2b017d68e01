"""Reading a request's body, and watching whether its client is still there."""

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from llm3.serve.errors import ApiError
from llm3.serve.fields import read_json

T = TypeVar("T")
LARGEST = 2**20  # bytes
SECONDS = 30.0  # in which a body must have come


async def read_body(request: Request) -> dict[str, Any]:
    """The object in the body. Raises ApiError; and ClientDisconnect."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # pages of other sites can send other kinds without being asked by the browser
        raise ApiError("expected the header Content-Type: application/json", status=415)
    size, chunks = 0, []
    try:
        async with asyncio.timeout(SECONDS):
            async for chunk in request.stream():  # the header with the length may lie
                size += len(chunk)
                if size > LARGEST:
                    raise ApiError(f"the body has more than {LARGEST:,} bytes", status=413, code="too_large")
                chunks.append(chunk)
    except TimeoutError:
        raise ApiError(f"the body did not come within {SECONDS:g} seconds", status=408, code="timeout") from None
    return read_json(b"".join(chunks))


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of the work, which is cancelled when the client leaves. Raises ClientDisconnect then."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect()
        return await task
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    """Wait until the client leaves; its body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass

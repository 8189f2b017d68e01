"""What every request passes first: its host, its key, and the count and time of its response."""

import base64
import binascii
import hmac
import logging
import time
from collections.abc import Collection

from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llm3.serve.errors import ApiError
from llm3.serve.metrics import Metrics

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
LARGEST_HEAD = 16 * 1024  # bytes of a request's path and headers
OPEN = ("/health",)  # paths that need no key
SAFETY = {
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
    b"cache-control": b"no-store",
}


class Guard:
    """Middleware. hosts: that a request may name; (): any. key: that it must bring; "": none.

    A page of another site can make a browser send requests to this machine under a name of its own (DNS rebinding), so
    the name is checked. The key comes as a bearer token, or as the password that a browser asks for.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, hosts: Collection[str], key: str, paths: Collection[str]):
        self._app, self._metrics, self._hosts, self._key, self._paths = app, metrics, hosts, key.encode(), paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the start and the end of the server: there are no websockets here
            return await self._app(scope, receive, send)
        began, status = time.monotonic(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                given = {name.lower() for name, _ in message["headers"]}
                message["headers"] += [(name, value) for name, value in SAFETY.items() if name not in given]
            await send(message)

        try:
            refused = self._refused(scope)
            await (refused or self._app)(scope, receive, watched)
        except Exception as error:
            logging.getLogger(__name__).exception("a request failed")
            if status:  # the response has begun: break the connection off
                raise RuntimeError("the response broke off") from error
            failed = ApiError("the server failed; its log says why", status=500, code="failed")
            await error_response(failed)(scope, receive, watched)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.add(path, status, time.monotonic() - began)

    def _refused(self, scope: Scope) -> Response | None:
        headers = scope["headers"]
        size = len(scope.get("raw_path") or b"") + len(scope["query_string"])
        if size + sum(len(name) + len(value) for name, value in headers) > LARGEST_HEAD:
            return error_response(
                ApiError(f"expected a path and headers of at most {LARGEST_HEAD:,} bytes", status=431)
            )
        host = next((value for name, value in headers if name == b"host"), b"").decode("latin-1")
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        if self._hosts and name.lower() not in self._hosts:
            error = ApiError(f"this server answers as {', '.join(self._hosts)} only", status=403, code="wrong_host")
            return error_response(error)
        if self._key and scope["path"] not in OPEN and not self._has_key(headers):
            error = ApiError("the api key is missing or wrong: Authorization: Bearer KEY", status=401, code="wrong_key")
            response = error_response(error)
            response.headers["www-authenticate"] = 'Basic realm="llm3", charset="UTF-8"'
            return response
        return None

    def _has_key(self, headers: Collection[tuple[bytes, bytes]]) -> bool:
        given = next((value for name, value in headers if name == b"authorization"), b"")
        kind, _, value = given.partition(b" ")
        value = value.strip()
        if kind.lower() == b"basic":
            try:
                value = base64.b64decode(value, validate=True).partition(b":")[2]
            except binascii.Error:
                return False
        return kind.lower() in (b"basic", b"bearer") and hmac.compare_digest(value, self._key)


def error_response(error: ApiError) -> JSONResponse:
    """The response to a request that failed."""
    headers = {"retry-after": str(error.retry_after)} if error.retry_after else None
    return JSONResponse(error.body(), error.status, headers)

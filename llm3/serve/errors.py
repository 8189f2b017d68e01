"""Errors that a client of the API gets, in OpenAI's shape."""

from typing import Any

from llm3.errors import closest


class ApiError(Exception):
    """An answer with an error. status: of HTTP. param: the field of the body that is wrong, if it is one."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        code: str | None = None,
        retry_after: int = 0,
    ):
        super().__init__(message)
        self.param, self.status, self.code, self.retry_after = param, status, code, retry_after

    def body(self) -> dict[str, Any]:
        """What the client reads."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def unknown_model(name: str, models: list[str]) -> ApiError:
    """There is no stage of this name."""
    known = ", ".join(models[:20]) + (f" and {len(models) - 20} more" if len(models) > 20 else "")
    message = f"model={name[:200]!r}: no such model; {closest(name[:200], models)}valid: {known}"
    return ApiError(message, "model", status=404, code="model_not_found")

"""Reading the fields of a request's body, each with its type and its range; what is wrong is said with its name."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from llm3.errors import closest
from llm3.serve.errors import ApiError

# Fields that clients of OpenAI send and that change no answer.
IGNORED = frozenset(
    {
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
        "parallel_tool_calls", "modalities",
    }
)  # fmt: skip
# Fields of OpenAI's protocol that llm3 does not have, with the values that ask for nothing.
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "best_of": (1,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "dimensions": (),
    "reasoning_effort": ("none",),
}


def read_json(body: bytes) -> dict[str, Any]:
    """The object that a body holds. Raises ApiError."""
    try:
        found = json.loads(body.decode(), parse_constant=_no_number)
    except RecursionError:
        raise ApiError("the body is nested too deeply") from None
    except ValueError as error:  # also bad UTF-8, and an integer of thousands of digits
        reason = str(error) if isinstance(error, json.JSONDecodeError) else "expected JSON in UTF-8"
        raise ApiError(f"the body cannot be read: {reason[:200]}") from None
    if not isinstance(found, dict):
        raise ApiError(f"the body is {kind_of(found)}: expected an object")
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def kind_of(value: Any) -> str:
    """The type of a JSON value in messages."""
    if isinstance(value, bool):
        return "true or false"
    names = {dict: "an object", list: "a list", str: "a string", int: "an integer", float: "a number"}
    return names.get(type(value), "null")


class Fields:
    """The fields of a body, which are taken out one after another. null is as good as missing.

    All methods raise ApiError with the name of the field.
    """

    def __init__(self, body: Mapping[str, Any]):
        self._left = {name: value for name, value in body.items() if value is not None}
        self._known: list[str] = []

    def take(self, name: str, default: Any = None) -> Any:
        """The value as it is."""
        self._known.append(name)
        return self._left.pop(name, default)

    def wrong(self, name: str, value: Any, expected: str) -> ApiError:
        """The error for a value."""
        shown = kind_of(value) if isinstance(value, dict | list | str) else repr(value)[:60]
        return ApiError(f"{name}: expected {expected}, not {shown}", name)

    def text(self, name: str, default: str | None = None) -> str:
        """A string. default: None if there must be one."""
        value = self.take(name, default)
        if value is None:
            raise ApiError(f"{name} is missing: expected a string", name)
        if not isinstance(value, str):
            raise self.wrong(name, value, "a string")
        return check_text(value, name)

    def texts(self, name: str, most: int) -> list[str]:
        """A string or a list of up to `most` strings, as a list."""
        value = self.take(name)
        if value is None:
            raise ApiError(f"{name} is missing: expected a string or a list of strings", name)
        values = [value] if isinstance(value, str) else value
        if not (isinstance(values, list) and all(isinstance(each, str) for each in values)):
            raise self.wrong(name, value, "a string or a list of strings")
        if not 1 <= len(values) <= most:
            raise ApiError(f"{name}: expected 1 to {most} strings, not {len(values)}", name)
        return [check_text(each, name) for each in values]

    def integer(self, name: str, default: int | None, least: int, most: int) -> int | None:
        """An integer from `least` to `most`."""
        value = self.take(name, default)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.wrong(name, value, f"an integer from {least} to {most}")
        return value

    def number(self, name: str, default: float, least: float, most: float) -> float:
        """A number from `least` to `most`."""
        value = self.take(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
            raise self.wrong(name, value, f"a number from {least:g} to {most:g}")
        return float(value)

    def flag(self, name: str) -> bool:
        """true or false; default: false."""
        value = self.take(name, False)
        if not isinstance(value, bool):
            raise self.wrong(name, value, "true or false")
        return value

    def end(self, ignored: frozenset[str] = IGNORED) -> None:
        """Raise ApiError for a field that is left."""
        for name, value in self._left.items():
            if name in WITHOUT_EFFECT:
                if value not in WITHOUT_EFFECT[name]:
                    raise ApiError(f"{name} is not supported", name)
            elif name not in ignored:
                shown = name[:100].encode(errors="replace").decode()
                message = f"{shown!r}: no such field; {closest(shown, self._known)}valid: {', '.join(self._known)}"
                raise ApiError(message, shown)


def check_text(text: str, name: str) -> str:
    """The text. Raises ApiError for one that has no UTF-8: half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ApiError(f"{name}: it holds half of a surrogate pair", name) from None
    return text


def are_tokens(value: Any) -> bool:
    """Whether a value is a list of integers, with at least one of them."""
    return isinstance(value, list) and bool(value) and all(type(each) is int for each in value)


def finite(values: Sequence[float]) -> list[float | None]:
    """Numbers for JSON, which has no NaN and no infinity: None."""
    return [float(each) if math.isfinite(each) else None for each in values]

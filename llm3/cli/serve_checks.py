"""Checks of the flags of `serve`, made before jax is imported."""

import ipaddress
import os
from collections.abc import Mapping
from typing import Any

from llm3.errors import UserError
from llm3.registry import check_package

LEAST_KEY = 8  # characters


def check_serve(options: Mapping[str, Any]) -> None:
    """Raise UserError for flags of `serve` that are out of range or open the server to everyone."""
    for library in ("starlette", "uvicorn"):
        check_package(library, "serve", "serve")
    for flag, least, most in (("port", 0, 65535), ("batch_size", 1, 1024), ("queue", 1, 100_000)):
        if not least <= options[flag] <= most:
            raise UserError(f"--{flag}={options[flag]}: expected {least} to {most}")
    if options["max_length"] is not None and options["max_length"] < 2:
        raise UserError(f"--max_length={options['max_length']}: expected at least 2")
    key = key_of(options["api_key"])
    if key and (len(key) < LEAST_KEY or not key.isascii() or not key.isprintable() or " " in key):
        raise UserError(f"--api_key: expected at least {LEAST_KEY} letters, digits and signs, without spaces")
    if not key and not is_loopback(options["host"]):
        raise UserError(
            f"--host={options['host']}: others could use the server: expected --api_key=KEY as well, or LLM3_API_KEY"
        )


def key_of(given: str) -> str:
    """The key of the flag, else of the environment; "": none."""
    return given or os.environ.get("LLM3_API_KEY", "")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

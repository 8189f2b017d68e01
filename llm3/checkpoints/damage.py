"""What Orbax and TensorStore say of damaged files, in words."""

import errno
import json
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from llm3.checkpoints.layout import missing_files
from llm3.errors import cause_chain, listed, say

T = TypeVar("T")

# What a network or a busy machine does to a read of an intact file.
PASSING = frozenset(
    getattr(errno, name)
    for name in (
        *("EIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "EINTR", "ENOTCONN", "ECONNRESET", "ECONNREFUSED", "EREMOTEIO"),
        *("ENETDOWN", "ENETUNREACH", "EHOSTDOWN", "EHOSTUNREACH", "EMFILE", "ENFILE", "ENOMEM", "EBUSY"),
    )
    if hasattr(errno, name)
)
PASSING_WORDS = ("DEADLINE_EXCEEDED", "UNAVAILABLE", "Barrier timed out")  # of TensorStore and of jax
WAITS = (1.0, 4.0, 15.0)  # seconds before a read is tried again

LEAF = re.compile(r'"([\w.]+)/(?:c/[\d/]+|zarr\.json)"')  # the name of an array in TensorStore's errors


class _OfDamage(logging.Filter):
    """Hides what asyncio prints of the other leaves of a part, once one of them could not be read."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "OCDBT" not in str(record.exc_info)


def quiet_asyncio() -> None:
    """Let asyncio print nothing of arrays that could not be read: the error says it."""
    logger = logging.getLogger("asyncio")
    if not any(isinstance(each, _OfDamage) for each in logger.filters):
        logger.addFilter(_OfDamage())


def passes(error: BaseException) -> bool:
    """Whether an error of a read says nothing of the file: another try may succeed."""
    for each in cause_chain(error):
        text = str(each)
        numbers = [int(number) for number in re.findall(r"os_error_code='(\d+)'", text)]
        own = [each.errno] if isinstance(each, OSError) else []
        if isinstance(each, TimeoutError) or PASSING.intersection([*numbers, *own]):
            return True
        if any(words in text for words in PASSING_WORDS):
            return True
    return False


def patiently(read: Callable[[], T]) -> T:
    """The result of a read, which is tried again after an error that may pass; the last one is raised."""
    for seconds in WAITS:
        try:
            return read()
        except Exception as error:
            if not passes(error):
                raise
            say(f"llm3: a checkpoint could not be read, and is tried again: {cause_chain(error)[0]}")
            time.sleep(seconds)
    return read()


def in_words(step: Path, part: str, error: BaseException) -> str:
    """Why a part ("params", "opt" or "meta") of a checkpoint could not be read. error: of Orbax."""
    if not (step / part).is_dir():
        return "it is missing"
    missing = missing_files(step, [part] if part != "meta" else [])
    if missing := [name.removeprefix(f"{part}/") for name in missing if name.startswith(f"{part}/")]:
        return f"{listed(missing)} in it is missing or empty"
    first = cause_chain(error)[0]
    if isinstance(first, json.JSONDecodeError):
        return "a JSON file in it is cut short or overwritten"
    if isinstance(first, OSError) and first.strerror:
        return f"{first.strerror}: {first.filename}"
    text = str(first)
    leaf = f", needed for {found[1].replace('.', '/')}" if (found := LEAF.search(text)) else ""
    if "NOT_FOUND" in text or "size of 0 bytes" in text:
        return f"a file in it is missing{leaf}"
    if "OUT_OF_RANGE" in text:
        return f"a file in it is cut short{leaf}"
    if "DATA_LOSS" in text:
        return f"a file in it is overwritten{leaf}"
    return "one of its files is overwritten"

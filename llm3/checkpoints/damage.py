"""What Orbax and TensorStore say of damaged files, in words."""

import json
import logging
import re
from pathlib import Path

from llm3.checkpoints.layout import missing_files
from llm3.errors import cause_chain, listed

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

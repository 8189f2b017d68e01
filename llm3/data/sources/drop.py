"""Files of training documents to leave out, which the verb `overlap` writes and a source names as `drop`."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from llm3.data.sources.records import Records
from llm3.errors import UserError
from llm3.files import local_path


def drop_lines(source: str, records: Records, rows: Mapping[int, Iterable[str]]) -> list[dict[str, Any]]:
    """Lines of a file that a source names as `drop`: the hash of a row's texts, and where it is from.

    rows: {row: the evaluations for whose sake it is left out}
    """
    return [
        {"hash": f"{digest:016x}", "source": source, "row": row, "evaluations": list(rows[row])}
        for row, digest in sorted(records.text_hashes(rows).items())
    ]


def read_drop(file: str) -> frozenset[int]:
    """The hashes of the texts to leave out, from a file of `drop_lines`. Raises UserError."""
    where = f"config: sources.*.drop={file!r}"
    try:
        lines = local_path(file, "config: sources.*.drop").read_text(encoding="utf-8").splitlines()
        return frozenset(int(json.loads(line)["hash"], 16) for line in lines if line.strip())
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}; `overlap --drop=FILE` writes such a file") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{where}: expected JSON lines with a hash, as `overlap --drop=FILE` writes them") from None

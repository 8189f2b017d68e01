"""The classes of the documents of a token cache."""

import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np

from llm3.data.cache.build import LABELS
from llm3.errors import UserError, counted, nearest

UNKNOWN = -1  # number of a class that is not in the given list


def read_labels(
    directory: Path, manifest: dict[str, Any], labels: list[str] | None
) -> tuple[list[str], list[list[int]] | None, np.ndarray | None]:
    """(class names, sets of classes or None if each document has one, class or set of each document: int32 [n]).

    A document with a class that is not in `labels` has the number UNKNOWN.
    """
    found = sorted({name for names in manifest["label_sets"] for name in names})
    if not (found or manifest["several"]):
        return [], None, None
    names = list(labels) if labels is not None else found
    number = {name: index for index, name in enumerate(names)}
    known = [number.keys() >= set(each) for each in manifest["label_sets"]]
    sets = [sorted(number[name] for name in each if name in number) for each in manifest["label_sets"]]
    kept = [each for each, is_known in zip(sets, known, strict=True) if is_known]
    ordered = sorted(kept) if manifest["several"] else [[index] for index in range(len(names))]
    place = {tuple(each): index for index, each in enumerate(ordered)}
    numbers = np.asarray(np.load(directory / LABELS, mmap_mode="r"))
    changed = [place[tuple(each)] if is_known else UNKNOWN for each, is_known in zip(sets, known, strict=True)]
    if changed != list(range(len(changed))):
        numbers = np.array(changed, np.int32)[numbers]
    return names, ordered if manifest["several"] else None, numbers


@functools.cache
def _say_once(line: str) -> None:
    """Print a line, which every library that opens the same cache would print again."""
    print(line, file=sys.stderr)


def check_unknown(
    unknown: np.ndarray,
    rows: np.ndarray,
    names: list[str],
    directory: Path,
    manifest: dict[str, Any],
    records: Any,
    max_bad_share: float,
) -> str:
    """The reason why the documents `unknown`, int [n], whose classes are not among `names`, are unusable.

    rows: int64 [documents], the row of each document. Prints the first; raises UserError if there are too many.
    """
    first = unknown[np.argmin(rows[unknown])]
    labels = manifest["label_sets"][np.load(directory / LABELS, mmap_mode="r")[first]]
    name = next(label for label in labels if label not in names)
    read = manifest["rows_read"]
    message = (
        f"source {records.name}: {len(unknown):,} of {counted(read, 'row')} of its {records.split} split have a class "
        f"that its train split does not have, the first: row {rows[first]} (counted from 0), class {name!r}: "
        f"{nearest(name, names)}"
    )
    if len(unknown) + sum(manifest["bad"].values()) > max_bad_share * read:
        raise UserError(f"{message}; more unusable rows than bad_rows={max_bad_share:g}")
    _say_once(f"tokens: {message}; set aside")
    return "class is not in the train split"

"""Evaluation results beyond single numbers (per class, per domain, examples), and the epochs of each source."""

from collections.abc import Iterator, Mapping
from typing import Any

from llm3.errors import listed
from llm3.report.escape import escaped
from llm3.report.units import NOT_APPLICABLE, words

LONGEST = 160  # max characters shown of a text


def in_detail(rows: list[dict], details: Mapping[str, dict | None]) -> list[str]:
    """A section with the details of the last stage that has any, and the files with the details of other stages."""
    kept = {stage: _without_confusion(each) for stage, each in details.items() if each}
    last = next((row["stage"] for row in reversed(rows) if kept.get(row["stage"])), "")
    if not (shown := kept.get(last)):
        return []
    parts = [f"## {last} in detail"]
    for name, value in shown.items():
        parts += [f"**{escaped(words(name))}**", *_shown(value)]
    others = [f"{stage}/details.json" for stage, value in details.items() if value and stage != last]
    return [*parts, f"Of the other stages: {listed(others)}."] if others else parts


def _without_confusion(details: dict) -> dict:
    """The details without the confusions, which heat maps show."""
    return {
        name: value
        for name, value in details.items()
        if not (isinstance(value, dict) and value.keys() == {"classes", "counts"})
    }


def repeated(rows: list[dict]) -> list[str]:
    """A section with the number of epochs that each stage made over each source."""
    lines = [
        f"- {row['stage']}: " + ", ".join(f"{source} {seen:.2g}" for source, seen in row["epochs"].items())
        for row in rows
        if row.get("epochs")
    ]
    return ["## Epochs of each source", "\n".join(lines)] if lines else []


def _shown(value: dict | list) -> Iterator[str]:
    """Plain values as Markdown: a dict or list of dicts becomes a table, anything else a list."""
    if isinstance(value, dict) and all(isinstance(each, dict) for each in value.values()):
        columns = list(dict.fromkeys(key for each in value.values() for key in each))
        yield text_table(
            ["", *map(str, columns)], [[name, *(each.get(key) for key in columns)] for name, each in value.items()]
        )
    elif isinstance(value, list) and all(isinstance(each, dict) for each in value):
        columns = list(dict.fromkeys(key for each in value for key in each))
        yield text_table(columns, [[each.get(key) for key in columns] for each in value])
    elif isinstance(value, dict):
        yield "\n".join(f"- {cell(name)}: {cell(each)}" for name, each in value.items())
    else:
        yield "\n".join(f"- {cell(each)}" for each in value)


def text_table(heads: list[str], lines: list[list[Any]], longest: int = LONGEST) -> str:
    """A Markdown table of plain values, left-aligned."""
    cells = [
        [cell(head, longest) if head else "" for head in heads],
        [":--"] * len(heads),
        *([cell(each, longest) for each in line] for line in lines),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def cell(value: Any, longest: int = LONGEST) -> str:
    """A plain value in a cell of a Markdown table, shortened."""
    if value is None:
        return NOT_APPLICABLE
    if isinstance(value, float):
        return f"{int(value):,}" if value.is_integer() and abs(value) > 1 else f"{value:.3f}"
    text = " ".join(str(value).split())
    return escaped(text if len(text) <= longest else text[: longest - 1] + "…")

"""Which column of some rows is the text, the label, the question, the answer or the conversation."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from llm3.data.formats import columns_of
from llm3.errors import UserError, listed, nearest

Rows = Sequence[Mapping[str, Any]]
TEXT = ("text", "content", "body", "document", "article", "abstract", "passage", "sentence")
LABEL = ("label", "labels", "class", "category", "target", "intent", "sentiment", "topic", "type")
QUESTION = ("prompt", "instruction", "question", "query", "input", "user")
ANSWER = ("answer", "response", "output", "completion", "reply", "assistant")
MOST_CLASSES = 1000
LONGEST_LABEL = 60  # characters, on average


class Classes(NamedTuple):
    """A column of class names, or of lists of them."""

    name: str
    number: int


def names_of(rows: Rows) -> list[str]:
    """All columns, in order."""
    return list(dict.fromkeys(name for row in rows for name in row))


def values(rows: Rows, name: str) -> list[Any]:
    """What a column holds, but nulls and blanks."""
    found = (row.get(name) for row in rows)
    return [each for each in found if each is not None and not (isinstance(each, str) and not each.strip())]


def mean_length(rows: Rows, name: str) -> float:
    """The mean characters of a column's texts; 0 for one that holds other things."""
    found = values(rows, name)
    texts = [each for each in found if isinstance(each, str)]
    return sum(map(len, texts)) / len(texts) if texts and len(texts) == len(found) else 0.0


def messages_column(rows: Rows) -> str:
    """The column with lists of turns; "" if there is none."""
    return next((name for name in names_of(rows) if _are_turns(values(rows[:100], name))), "")


def _are_turns(found: list[Any]) -> bool:
    lists = [_structure(each) for each in found]
    turns = [turn for each in lists if isinstance(each, list) for turn in each]
    return bool(turns) and all(isinstance(turn, Mapping) and {"role", "from"} & set(turn) for turn in turns)


def _structure(value: Any) -> Any:
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def question_and_answer(rows: Rows) -> tuple[str, str]:
    """The columns with questions and with answers, by their names; "" for one that is not there."""
    names = {name.lower(): name for name in names_of(rows) if mean_length(rows, name)}
    found = [next((names[word] for word in words if word in names), "") for words in (QUESTION, ANSWER)]
    return found[0], found[1]


def label_column(rows: Rows, given: str, flag: str) -> Classes:
    """The column with the classes. given: by the user, or "". Raises UserError where the rows do not tell it."""
    if given:
        known(rows, [given], "--label")
        return Classes(given, _classes(rows, given) or len(set(map(str, values(rows, given)))))
    found = [Classes(name, number) for name in names_of(rows) if (number := _classes(rows, name))]
    named = [each for word in LABEL for each in found if each.name.lower() == word]
    if named:
        return named[0]
    if not found:
        raise UserError(
            f"{flag}: no column looks like a label: expected one with few different values; "
            f"choose it with --label=COLUMN (columns: {listed(names_of(rows), 10)})"
        )
    if len(found) > 1:
        candidates = " or ".join(f"{each.name!r} ({each.number} classes)" for each in found)
        raise UserError(f"{flag}: the label may be {candidates}: choose with --label={found[0].name}")
    return found[0]


def _classes(rows: Rows, name: str) -> int:
    """How many classes a column names; 0 if it does not look like one with classes."""
    found = values(rows, name)
    names = [str(label) for each in found for label in (each if isinstance(each, list) else [each])]
    kinds = (label for each in found for label in (each if isinstance(each, list) else [each]))
    if not names or not all(isinstance(label, str | int) for label in kinds):
        return 0
    number = len(set(names))
    few = 2 <= number <= min(MOST_CLASSES, max(2, len(names) // 2))
    return number if few and sum(map(len, names)) / len(names) <= LONGEST_LABEL else 0


def text_column(rows: Rows, given: str, flag: str, without: Iterable[str] = (), only_said: bool = False) -> str:
    """The column with the text, or the template over columns that the user gave.

    only_said: take the longest where several may be meant. Raises UserError where the rows do not tell it.
    """
    if given:
        known(rows, columns_of(given), "--text")
        return given
    lengths = {name: mean_length(rows, name) for name in names_of(rows) if name not in set(without)}
    found = sorted((name for name in lengths if lengths[name]), key=lambda name: -lengths[name])
    if not found:
        raise UserError(f"{flag}: no column holds texts (columns: {listed(names_of(rows), 10)})")
    named = [name for word in TEXT for name in found if name.lower() == word]
    if named:
        return named[0]
    if len(found) > 1 and not only_said and lengths[found[1]] > lengths[found[0]] / 2:
        raise UserError(
            f"{flag}: the text may be {found[0]!r} or {found[1]!r}: choose with --text={found[0]}, or take both with "
            f"--text='{{{found[0]}}} {{{found[1]}}}'"
        )
    return found[0]


def known(rows: Rows, wanted: Iterable[str], flag: str) -> None:
    """Raise UserError for a column that the rows do not have."""
    for name in wanted:
        if name not in (names := names_of(rows)):
            raise UserError(f"{flag}={name}: no such column; {nearest(name, names)}")


def text_bytes(rows: Rows, specs: Iterable[str]) -> int:
    """UTF-8 bytes of columns, or of templates over columns."""
    names = {name for spec in specs if spec for name in columns_of(spec)}
    return sum(len(str(row[name]).encode(errors="replace")) for row in rows for name in names if row.get(name))

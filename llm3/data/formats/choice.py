"""Multiple choice: a prompt, several choices, and the correct one."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from llm3.config.data_schema import SourceConfig
from llm3.data.encoding import concatenate_runs, encode_pieces, merge_texts
from llm3.data.formats import BadRow, Document, bytes_of, dialogue, structure, text_of, value
from llm3.data.formats.dialogue import render_answers
from llm3.data.tokenizer import Pieces, Tokenizer
from llm3.errors import UserError, say

LETTER = re.compile(r"\(?([A-Za-z])[).:]?")  # as MMLU writes its answers


def resolve(rows: Iterable[Mapping[str, Any]], source: SourceConfig, where: str) -> SourceConfig:
    """The source with its `answer_base`, if answers are numbers: some are 0, or some the number of their choices.

    Says which. Raises UserError, starting with `where`, if neither or both are so, or if other answers can only be
    texts of choices.
    """
    if source.answer_base is not None:
        return source
    numbers: set[int] = set()
    bases: set[int] = set()
    named = False  # whether an answer is the text of a choice, and no number of one
    for row in rows:
        try:
            choices, answer = _choices(row, source), value(row, source.answer)
        except BadRow:
            continue
        number = _number(answer, choices)
        if answer in choices.texts:
            named = named or number is None or number > len(choices.texts)
        elif number is not None:
            numbers.add(number)
            bases |= {base for base, telling in enumerate((0, len(choices.texts))) if number == telling}
    if not numbers:
        return source
    if len(bases) == 1 and not named:
        say(f"{where}: {source.answer}: choices are counted from {min(bases)}")
        return dataclasses.replace(source, answer_base=min(bases))
    found = "both 0 and the number of choices among them" if bases else "none of them 0 or the number of choices"
    found = "but other answers are texts of choices" if named else found
    raise UserError(
        f"{where}: {source.answer}: numbers from {min(numbers)} to {max(numbers)}, {found}: expected "
        "sources.*.answer_base=0 or 1, the number of the first choice"
    )


class _Choices(NamedTuple):
    texts: list[str]
    labels: list[str]  # what rows call their choices; []: nothing


def read_row(row: Mapping[str, Any], source: SourceConfig) -> dict[str, Any]:
    """{"prompt", "choices": list of str, "correct": index of the correct choice}. Raises BadRow.

    The column of choices holds a list of texts, {"text": [...], "label": [...]} (ARC), or a list of {"text", "label"}.
    """
    choices = _choices(row, source)
    correct = _correct(row, source, choices)
    return {"prompt": text_of(row, source.prompt), "choices": choices.texts, "correct": correct}


def read_input(row: Mapping[str, Any], source: SourceConfig) -> dict[str, Any]:
    """{"turns": the prompt as the user's turn}, as of a dialogue. Raises BadRow."""
    return {"turns": [["user", text_of(row, source.prompt)]]}


def columns(source: SourceConfig) -> list[str]:
    """The field of the prompt."""
    return [source.prompt]


def _choices(row: Mapping[str, Any], source: SourceConfig) -> _Choices:
    if isinstance(source.choices, str):
        name, one = source.choices, f"one of {source.choices}"
        texts, labels = _with_labels(structure(row, name), name)
        texts = [text_of({one: each}, one) for each in texts]
    else:
        name, one, labels = "choices", "a choice", []
        texts = [text_of(row, each) if "{" in each else text_of({one: each}, one) for each in source.choices]
    if len(texts) < 2:
        raise BadRow(f"{name} has fewer than 2 choices")
    if len(set(texts)) < len(texts):
        raise BadRow(f"{name} has the same choice twice")
    return _Choices(texts, labels)


def _with_labels(found: Any, name: str) -> tuple[list[Any], list[str]]:
    """(texts, labels) of a column of choices. Raises BadRow."""
    if isinstance(found, list | tuple) and found and all(isinstance(each, Mapping) for each in found):
        found = {key: [each.get(key) for each in found] for key in ("text", "label")}
    if isinstance(found, Mapping) and isinstance(found.get("text"), list | tuple):
        texts, labels = found["text"], found.get("label")
        if not isinstance(labels, list | tuple) or len(labels) != len(texts) or None in labels:
            raise BadRow(f"{name} has not one label for each text")
        return list(texts), [str(label) for label in labels]
    if not isinstance(found, list | tuple):
        raise BadRow(f"{name} is of type {type(found).__name__}, not a list")
    return list(found), []


def _correct(row: Mapping[str, Any], source: SourceConfig, choices: _Choices) -> int:
    """The index of the correct choice, from its label, its text, its letter, its number, or a truth value."""
    field = source.answer
    answer = value(row, field) if field in row else text_of(row, field)
    if choices.labels and not isinstance(answer, bool) and str(answer).strip() in choices.labels:
        return choices.labels.index(str(answer).strip())
    number = _number(answer, choices)
    if isinstance(answer, str) and answer in choices.texts and (number is None or source.answer_base is None):
        return choices.texts.index(answer)
    if number is not None:
        number -= source.answer_base or 0
    elif isinstance(answer, bool):
        number = int(answer)
    elif not isinstance(answer, str | int):
        raise BadRow(f"{field} is of type {type(answer).__name__}, not a choice or its index")
    elif (number := _letter(str(answer), choices)) is None:
        raise BadRow(f"{field} is none of the choices")
    if not 0 <= number < len(choices.texts):
        raise BadRow(f"{field} is not the index of a choice")
    return number


def _letter(answer: str, choices: _Choices) -> int | None:
    """The index that a letter names; None if it names none, or if choices are letters themselves."""
    letter = LETTER.fullmatch(answer.strip())
    if letter is None or choices.labels or any(LETTER.fullmatch(each.strip()) for each in choices.texts):
        return None
    index = ord(letter[1].upper()) - ord("A")
    return index if index < len(choices.texts) else None


def _number(answer: Any, choices: _Choices) -> int | None:
    """An answer that is, or may be, the number of a choice, counted from 0 or 1; None for any other."""
    if isinstance(answer, bool) or choices.labels:
        return None
    if isinstance(answer, str):
        digits = answer.strip()
        return int(digits) if digits.isascii() and digits.isdecimal() and len(digits) < 10 else None
    return answer if isinstance(answer, int) else None


def encode(record: dict[str, Any], tokenizer: Tokenizer, template: str) -> Document:
    """The prompt and the correct choice, encoded jointly, as `evals/choice.py` scores them.

    The answer mask covers the choice and its end. note: "choices", "correct", "prompt", the pieces before the choice,
    and "joint" for `encode_choice`. Raises BadRow.
    """
    choices, correct = record["choices"], record["correct"]
    [answer] = render_answers([("user", record["prompt"]), ("assistant", choices[correct])], template, tokenizer)
    if answer.text != choices[correct]:  # the template strips white space
        choices = [each.strip() for each in choices]
    prompt = merge_texts(answer.before + answer.lead)
    joint = bool(template) and tokenizer.foreign
    if not tokenizer.lossless and not all(tokenizer.encode_batch(choices)):
        raise BadRow("a choice has no tokens")
    ids, first = encode_choice(prompt, choices[correct], tokenizer, joint=joint)
    tokens, labelled = concatenate_runs(
        [(ids[:first], False), (ids[first:] + encode_pieces(answer.end, tokenizer), True)]
    )
    note = {"prompt": prompt, "choices": choices, "correct": correct} | ({"joint": True} if joint else {})
    return Document(tokens, labelled, bytes_of([record["prompt"], choices[correct]]), note=note)


def encode_prompt(record: dict[str, Any], tokenizer: Tokenizer, template: str) -> Document:
    """The prompt of `read_input`, as that of a dialogue. Raises BadRow."""
    return dialogue.encode_prompt(record, tokenizer, template)


def encode_choice(prompt: Pieces, choice: str, tokenizer: Tokenizer, *, joint: bool = False) -> tuple[list[int], int]:
    """(tokens of a prompt and a choice, encoded jointly; index of the first token with a character of the choice).

    joint: see `Tokenizer.encode_spans`.
    """
    found = tokenizer.encode_spans(merge_texts([*prompt, choice]), joint=joint)
    start = sum(len(piece) if isinstance(piece, str) else 1 for piece in prompt)
    return found.ids, next((place for place, end in enumerate(found.ends) if end > start), len(found.ids))


def texts(record: dict[str, Any]) -> list[str]:
    """The prompt and all choices."""
    return [record["prompt"], *record["choices"]]

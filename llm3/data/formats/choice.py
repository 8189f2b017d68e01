"""Multiple choice: a prompt, several choices, and the correct one."""

from collections.abc import Mapping
from typing import Any

from llm3.config.data_schema import SourceConfig
from llm3.data.chat_templates import Pieces, encode_pieces, merge_texts
from llm3.data.formats import BadRow, Document, bytes_of, text_of, value
from llm3.data.formats.dialogue import concatenate_runs, render_answers
from llm3.data.tokenizer import Tokenizer


def read_row(row: Mapping[str, Any], source: SourceConfig) -> dict[str, Any]:
    """{"prompt", "choices": list of str, "correct": index of the correct choice}. Raises BadRow."""
    fixed = not isinstance(source.choices, str)
    name, one = ("choices", "a choice") if fixed else (source.choices, f"one of {source.choices}")
    choices = source.choices if fixed else value(row, name)
    if not isinstance(choices, list | tuple):
        raise BadRow(f"{name} is of type {type(choices).__name__}, not a list")
    choices = [text_of({one: each}, one) for each in choices]
    if len(choices) < 2:
        raise BadRow(f"{name} has fewer than 2 choices")
    if len(set(choices)) < len(choices):
        raise BadRow(f"{name} has the same choice twice")
    return {"prompt": text_of(row, source.prompt), "choices": choices, "correct": _correct(row, source.answer, choices)}


def _correct(row: Mapping[str, Any], field: str, choices: list[str]) -> int:
    """The index of the correct choice, from its text, an index, digits that are no choice, or a truth value."""
    answer = value(row, field) if field in row else text_of(row, field)
    if isinstance(answer, str):
        if answer in choices:
            return choices.index(answer)
        if not (answer.isascii() and answer.isdecimal()):
            raise BadRow(f"{field} is none of the choices")
        answer = int(answer)
    if not isinstance(answer, int):
        raise BadRow(f"{field} is of type {type(answer).__name__}, not a choice or its index")
    if not 0 <= answer < len(choices):
        raise BadRow(f"{field} is not the index of a choice")
    return int(answer)


def encode(record: dict[str, Any], tokenizer: Tokenizer, template: str) -> Document:
    """The prompt and the correct choice, encoded jointly, as `evals/choice.py` scores them.

    The answer mask covers the choice and its end. note: "choices", "correct", and "prompt", the pieces before the
    choice. Raises BadRow.
    """
    choices, correct = record["choices"], record["correct"]
    [answer] = render_answers([("user", record["prompt"]), ("assistant", choices[correct])], template)
    if answer.text != choices[correct]:  # the template strips white space
        choices = [each.strip() for each in choices]
    prompt = merge_texts(answer.before + answer.lead)
    ids, first = encode_choice(prompt, choices[correct], tokenizer)
    tokens, labelled = concatenate_runs(
        [(ids[:first], False), (ids[first:] + encode_pieces(answer.end, tokenizer), True)]
    )
    note = {"prompt": prompt, "choices": choices, "correct": correct}
    return Document(tokens, labelled, bytes_of([record["prompt"], choices[correct]]), note=note)


def encode_choice(prompt: Pieces, choice: str, tokenizer: Tokenizer) -> tuple[list[int], int]:
    """(tokens of a prompt and a choice, encoded jointly; index of the first token with a byte of the choice)."""
    *before, last = prompt
    if not isinstance(last, str):
        before, last = prompt, ""
    start, joint = encode_pieces(before, tokenizer), tokenizer.encode(last + choice)
    room = len(last.encode())
    for place, token in enumerate(joint):
        room -= int(tokenizer.byte_lengths[token])
        if room < 0:
            return start + joint, len(start) + place
    raise AssertionError("a choice has no bytes")


def texts(record: dict[str, Any]) -> list[str]:
    """The prompt and all choices."""
    return [record["prompt"], *record["choices"]]

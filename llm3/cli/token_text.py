"""Tokens as lines of text, with what matters in them marked."""

import sys

import numpy as np
from rich.text import Text

from llm3.data.tokenizer import Tokenizer


def marked(text: str, colours: bool) -> str:
    """Marked text: reversed on a terminal, else in angle quotes."""
    return f"[reverse]{text}[/reverse]" if colours else f"«{text}»"


def piece(text: str, is_marked: bool) -> Text:
    """A piece of a text, which may be marked."""
    if is_marked and not sys.stdout.isatty():
        return Text(f"«{text}»")
    return Text(text, style="reverse" if is_marked else "")


def spelled(tokens: np.ndarray, tokenizer: Tokenizer) -> str:
    """Tokens as one line of text, with special tokens by name."""
    runs: list[str] = []
    text: list[int] = []
    special = set(tokenizer.specials.values())
    for token in tokens.tolist():
        if token in special:
            runs += [tokenizer.decode(text), tokenizer.tokens[token]]
            text = []
        else:
            text.append(token)
    return "".join([*runs, tokenizer.decode(text)]).replace("\n", "⏎")

"""Tokens as lines of text, with what matters in them marked."""

import sys

from rich.text import Text


def marked(text: str, colours: bool) -> str:
    """Marked text: reversed on a terminal, else in angle quotes."""
    return f"[reverse]{text}[/reverse]" if colours else f"«{text}»"


def piece(text: str, is_marked: bool) -> Text:
    """A piece of a text, which may be marked."""
    if is_marked and not sys.stdout.isatty():
        return Text(f"«{text}»")
    return Text(text, style="reverse" if is_marked else "")

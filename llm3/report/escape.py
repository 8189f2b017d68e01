"""Data in Markdown: texts, labels and values that must be shown as they are, whatever they contain."""

import re

SPECIAL = re.compile(r"[\\`*\[\]<>&|~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
OPENING, CLOSING = "«", "»"  # around what a block of the language MARKED marks
MARKED = "marked"


def escaped(text: str) -> str:
    """A text on one line as it is, anywhere in a page: nothing in it becomes markup, HTML, a link or an image."""
    text = escaped_cell(text)
    return re.sub(r"^(\d*)([#+\-=.)])", r"\1\\\2", text)


def escaped_cell(text: str) -> str:
    """As `escaped`, but only in a cell of a table, where no list or heading begins."""
    return SPECIAL.sub(lambda found: f"\\{found[0]}", " ".join(text.split()))


def block(text: str, language: str = "") -> str:
    """A text of several lines as a code block; a fence in the text does not end it."""
    longest = max(map(len, re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def marked_block(lines: list[list[tuple[str, bool]]]) -> str:
    """A block with a line for each list of pieces (text, whether it is marked)."""
    plain = str.maketrans({OPENING: "\u2039", CLOSING: "\u203a", "\n": "⏎", "\r": "␍"})
    shown = (
        "".join(f"{OPENING}{text.translate(plain)}{CLOSING}" if mark else text.translate(plain) for text, mark in line)
        for line in lines
    )
    return block("\n".join(shown), MARKED)

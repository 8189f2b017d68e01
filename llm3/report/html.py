"""A report as one HTML file from its Markdown: its figures inside it, no script, nothing loaded from elsewhere."""

import itertools
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm3.files import FIGURES, REPORT, REPORT_HTML, write_atomic
from llm3.report.escape import CLOSING, MARKED, OPENING
from llm3.report.plots.svg import PALETTE, for_page

if TYPE_CHECKING:  # slow to import
    from markdown_it import MarkdownIt
    from markdown_it.token import Token

STYLE = Path(__file__).with_name("page.css")
# The browser itself refuses scripts, and whatever is not in the file.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
LARGEST = 800_000  # characters of all figures in a page; later ones are linked
NARROWEST = 0.78  # a figure is not drawn smaller than this share of its size: a narrow page scrolls it


def write_page(directory: Path, title: str, markdown: str, figures: Mapping[str, str]) -> None:
    """Write DIR/report.md, its figures in DIR/figures/, and DIR/report.html with the figures in it.

    markdown: with links to figures as ![title](figures/NAME). figures: {NAME: text of an SVG}; those of an earlier
    report are removed. Equal arguments give equal bytes. Raises OSError if the disk refuses.
    """
    for name, svg in figures.items():
        write_atomic(directory / FIGURES / name, svg)
    for path in (directory / FIGURES).glob("*.svg"):
        if path.name not in figures:
            path.unlink()
    write_atomic(directory / REPORT, markdown)
    write_atomic(directory / REPORT_HTML, page_html(title, markdown, figures))


def page_html(title: str, markdown: str, figures: Mapping[str, str]) -> str:
    """The page. HTML in the Markdown is shown as text; an image that is none of the figures, as its title.

    Figures are inside the page up to `LARGEST`, so that it stays below 1 MB; the others are links to their files.
    """
    parser = _parser({f"{FIGURES}/{name}": svg for name, svg in figures.items()})
    tokens = parser.parse(markdown)
    contents = _with_anchors(tokens)
    body = parser.renderer.render(tokens, parser.options, {})
    links = "".join(f'<li><a href="#{anchor}">{escape(text)}</a></li>' for anchor, text in contents)
    navigation = f'<nav aria-label="Contents"><ul>{links}</ul></nav>' if len(contents) > 1 else ""
    first = body.find("<h2")  # the contents stand below the verdict
    before, after = (body[:first], body[first:]) if first >= 0 else (body, "")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>\n{colours()}{STYLE.read_text(encoding='utf-8')}</style>\n"
        f"</head>\n<body>\n<main>\n{before}{navigation}\n{after}</main>\n</body>\n</html>\n"
    )


def colours() -> str:
    """The colours of the figures as CSS variables, for a light and for a dark page."""
    light = " ".join(f"--{name}: {colour};" for colour, (name, _) in PALETTE.items())
    dark = " ".join(f"--{name}: {colour};" for name, colour in PALETTE.values())
    return f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"


def _with_anchors(tokens: "Sequence[Token]") -> list[tuple[str, str]]:
    """Give each heading of the second level an anchor; returns (anchor, text) of all."""
    found: dict[str, str] = {}
    for token, inline in itertools.pairwise(tokens):
        if token.type == "heading_open" and token.tag == "h2":
            text = "".join(child.content for child in inline.children or [])
            base = re.sub(r"\W+", "-", text.lower()).strip("-") or "section"
            anchor, number = base, 2
            while anchor in found:
                anchor, number = f"{base}-{number}", number + 1
            found[anchor] = text
            token.attrSet("id", anchor)
    return list(found.items())


def _parser(figures: Mapping[str, str]) -> "MarkdownIt":
    """CommonMark with tables, without HTML, with figures in place."""
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    left = LARGEST

    def image(tokens: "Sequence[Token]", index: int, *_: Any) -> str:
        token = tokens[index]
        title, source = escape(token.content), str(token.attrs["src"])
        if (svg := figures.get(source)) is None:
            return title
        nonlocal left
        left -= len(svg)
        return _inline(svg, Path(source).stem, title) if left >= 0 else f'<a href="{escape(source)}">{title}</a>'

    def fence(tokens: "Sequence[Token]", index: int, *_: Any) -> str:
        token = tokens[index]
        text = escape(token.content)
        if token.info != MARKED:
            return f'<pre tabindex="0"><code>{text}</code></pre>\n'
        text = text.replace(OPENING, "<mark>").replace(CLOSING, "</mark>")
        lines = "".join(f"<p>{line}</p>" for line in text.splitlines())
        return f'<div class="samples">{lines}</div>\n'

    parser.renderer.rules |= {  # type: ignore[attr-defined]
        "image": image,
        "fence": fence,
        "table_open": lambda *_: '<div class="scroll" tabindex="0"><table>\n',
        "table_close": lambda *_: "</table></div>\n",
    }
    return parser


def _inline(svg: str, name: str, title: str) -> str:
    """A figure in its own box, which scrolls where the page is narrow."""
    name = re.sub(r"\W+", "-", name)
    width = re.search(r'<svg width="([\d.]+)pt" height="[\d.]+pt"', svg)
    points = float(width[1]) if width else 0
    svg = for_page(svg, name)
    size = f'style="width: {points:g}pt; min-width: {NARROWEST * points:.0f}pt"'
    svg = re.sub(r'<svg width="[^"]*" height="[^"]*"', f'<svg role="img" aria-label="{title}" {size}', svg, count=1)
    return f'<span class="figure" tabindex="0">{svg}</span>'

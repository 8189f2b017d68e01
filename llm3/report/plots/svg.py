"""Figures as small SVG texts: equal figures give equal bytes, text stays text, colours fit a light and a dark page.

The colours are those of Okabe and Ito (Color Universal Design, 2008), safe for colour-blind readers. A series differs
from the others by its dashes and its marker too. In a page, `for_page` replaces the colours by CSS variables.
"""

import io
import itertools
import math
import re
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # slow to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID, PAPER = "#1f2328", "#59636e", "#d8dee4", "#ffffff"
BLUE, VERMILLION, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#b5578c"
# {colour of a file: (name of its CSS variable, colour on a dark page)}
PALETTE = {
    INK: ("ink", "#e6edf3"),
    MUTED: ("muted", "#9da7b3"),
    GRID: ("grid", "#3d444d"),
    PAPER: ("paper", "#0d1117"),
    BLUE: ("blue", "#56b4e9"),
    VERMILLION: ("vermillion", "#f58b44"),
    GREEN: ("green", "#2dc89a"),
    PURPLE: ("purple", "#e39bc6"),
}
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, INK)
DASHES = ("-", (0, (4, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.linewidth": 0.8,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titlepad": 8,
    "axes.titlecolor": INK,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "text.color": INK,
    "text.parse_math": False,  # a label may have dollar signs
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "figure.dpi": 72,  # so that pixels are points, as in the file
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "path.simplify": True,
    "path.simplify_threshold": 0.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "llm3",
}


class Look(NamedTuple):
    """What tells a series from the others: never its colour alone."""

    colour: str
    dashes: Any
    marker: str


def look(index: int) -> Look:
    """The look of the series with this index; 140 are different."""
    return Look(COLOURS[index % len(COLOURS)], DASHES[index % len(DASHES)], MARKERS[index % len(MARKERS)])


class Margins(NamedTuple):
    """The space around the axes of a panel, in inches, for labels, ticks and title."""

    left: float = 0.6
    right: float = 0.2
    bottom: float = 0.5
    top: float = 0.35


@dataclass
class Drawing:
    """A figure while it is drawn. svg: its text, once the context of `figure` has ended."""

    figure: "Figure"
    axes: "list[Axes]"
    svg: str = ""


def row_sizes(panels: int, most: int) -> list[int]:
    """How many panels stand in each row of a figure, at most `most`: as even as possible, so that no slot is empty."""
    lines = math.ceil(panels / most)
    return [panels // lines + (line < panels % lines) for line in range(lines)]


def first_of_row(index: int, panels: int, most: int) -> bool:
    """Whether a panel stands at the left of its row."""
    return index in itertools.accumulate(row_sizes(panels, most), initial=0)


@contextmanager
def figure(
    panels: int = 1,
    most: int = 1,
    size: tuple[float, float] = (3.2, 2.2),
    margins: Margins | None = None,
    aside: float = 0.0,
) -> Iterator[Drawing]:
    """A figure of `panels` panels, at most `most` side by side.

    size: of the axes of a panel in a full row, in inches; those of a row that has fewer panels are wider. The margins
    are given, since measuring the labels would take as long as drawing. aside: inches at the right, for
    a legend.
    """
    from matplotlib import rc_context, rcParamsDefault
    from matplotlib.figure import Figure

    margins = margins or Margins()
    sizes = row_sizes(panels, most)
    inner = sizes[0] * (margins.left + size[0] + margins.right)
    width = inner + aside
    line_height = margins.bottom + size[1] + margins.top
    height = line_height * len(sizes)
    own = {**rcParamsDefault, **STYLE}  # not the matplotlibrc of the user
    own.pop("backend")
    with rc_context(own), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the reader's fonts have it
        drawn = Drawing(Figure(figsize=(width, height)), [])
        for line, number in enumerate(sizes):
            bottom = height - (line + 1) * line_height + margins.bottom
            for at in range(number):
                left = at * inner / number + margins.left
                inside = inner / number - margins.left - margins.right
                box = (left / width, bottom / height, inside / width, size[1] / height)
                drawn.axes.append(drawn.figure.add_axes(box))
        yield drawn
        file = io.StringIO()
        drawn.figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    drawn.svg = tidy(file.getvalue())


def text_inches(text: str, points: float = 8) -> float:
    """About the width of a text, in inches."""
    return 0.62 * points / 72 * len(text)


def shortened(text: str, longest: int = 28) -> str:
    """A label on one line, with its middle left out if it is long."""
    text = " ".join(str(text).split())
    if text.startswith("_"):
        text = f"\u200b{text}"  # matplotlib has no legend entry for a label that begins with "_"
    half = longest // 2
    return text if len(text) <= longest else f"{text[: longest - half]}…{text[len(text) - half + 1 :]}"


ROUND = "<style>*{stroke-linejoin:round}"  # of the style sheet, which ends with the classes
FONT = ' font-family="DejaVu Sans, Verdana, sans-serif"'


def tidy(svg: str) -> str:
    """An SVG of matplotlib without prolog, metadata and ids that nothing refers to, on white paper."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<style type="text/css">.*?</style>', ROUND, svg, flags=re.DOTALL)
    used = {each for tag in re.findall(r"<[^>]*>", svg) for each in re.findall(r"(?:url\(|href=\")#([^)\"]+)", tag)}

    def short(found: re.Match) -> str:
        tag = re.sub(r' id="([^"]*)"', lambda own: own[0] if own[1] in used else "", found[0])
        tag = tag.replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "").replace("xlink:href", "href")
        tag = re.sub(r" font-family: [^;\"]*;", "", tag).replace("\n", " ")
        return tag if "matrix(" in tag else re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", tag)

    svg = _without_plain_groups(re.sub(r"<[^>]*>", short, svg)).replace(' version="1.1"', FONT, 1)
    svg = with_classes(re.sub(r' transform="rotate\(-0 [^"]*"', "", svg))
    start = svg.index(">") + 1
    paper = f'<rect width="100%" height="100%" style="fill: {PAPER}"/>'
    body = re.sub(r"\n\s*", "\n", svg[start:]).strip()
    return f"{svg[:start]}\n{paper}\n{body}\n"


def with_classes(svg: str) -> str:
    """The SVG with a class in the place of a style that is used several times: most of a figure with many lines.

    The name of a class is made of its style, so that figures of one page may share it.
    """
    counts = Counter(re.findall(r'style="([^"]*)"', svg))
    often = (style for style, count in counts.items() if count > 2 and "url(" not in style)
    names = {style: f"s{zlib.crc32(style.encode()):08x}" for style in often}
    svg = re.sub(r'style="([^"]*)"', lambda own: f'class="{names[own[1]]}"' if own[1] in names else own[0], svg)
    rules = "".join(f".{name}{{{style}}}" for style, name in names.items())
    return svg.replace(ROUND, f"{ROUND}{rules}</style>", 1)


def _without_plain_groups(svg: str) -> str:
    """The SVG without groups that have no attribute, which are half of its tags."""
    kept: list[bool] = []

    def own(found: re.Match) -> str:
        if found[0] == "</g>":
            return found[0] if kept.pop() else ""
        if found[0].endswith("/>"):
            return ""
        kept.append(found[0] != "<g>")
        return found[0] if kept[-1] else ""

    return re.sub(r"</?g\b[^>]*>", own, svg)


def for_page(svg: str, name: str) -> str:
    """The SVG as a part of a page: its ids begin with the name of the figure, its colours are CSS variables."""
    colours = re.compile("|".join(PALETTE))

    def own(found: re.Match) -> str:
        tag = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", found[0])
        return colours.sub(lambda colour: f"var(--{PALETTE[colour[0]][0]})", tag)

    svg = svg.replace(ROUND, "<style>", 1).replace(FONT, "", 1)
    svg = re.sub(r'<rect width="100%" height="100%"[^>]*>\n', "", svg, count=1)
    return re.sub(r"<style>[^<]*</style>|<[^>]*>", own, svg)

"""Heat maps: cells with their values as text, in colours that are the same on a light and on a dark page."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llm3.report.plots.svg import Margins, figure, shortened, text_inches

if TYPE_CHECKING:  # slow to import
    from matplotlib.axes import Axes

Shades = Sequence[Sequence[float | None]]
LIGHT, DARK, OTHER = (235, 243, 250), (4, 65, 116), (147, 52, 0)  # RGB: of 0, of 1, of -1
UNKNOWN = "#c9c9c9"
ROW_INCHES = 0.3


def plot_heat_map(rows: Sequence[str], columns: Sequence[str], shades: Shades, texts: Sequence[Sequence[str]]) -> str:
    """A table of coloured cells as SVG.

    shades: [row][column], 0 (light) to 1 (dark blue), or down to -1 (dark red); None: grey. texts: of the cells.
    """
    names = [shortened(name) for name in rows]
    heads = [shortened(name) for name in columns]
    width = max(0.75, *(text_inches(text) + 0.15 for line in texts for text in line))
    tall = max(map(text_inches, heads))
    slanted = tall > width
    margins = Margins(
        left=max(map(text_inches, names)) + 0.15,
        right=0.1 + 0.6 * tall * slanted,
        bottom=0.1,
        top=0.25 + 0.5 * tall * slanted,
    )
    with figure(size=(width * len(heads), ROW_INCHES * len(names)), margins=margins) as drawing:
        (axes,) = drawing.axes
        draw_cells(axes, shades, texts)
        axes.set_yticks(range(len(names)), names)
        slant = {"rotation": 30, "ha": "left"} if slanted else {}
        axes.set_xticks(range(len(heads)), heads, **slant)  # type: ignore[arg-type]
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
    return drawing.svg


def draw_cells(axes: "Axes", shades: Shades, texts: Sequence[Sequence[str]], points: float = 8) -> None:
    """Draw coloured cells with texts at integer positions, row 0 at the top."""
    from matplotlib.patches import Rectangle

    for row, (line, written) in enumerate(zip(shades, texts, strict=True)):
        for column, (shade, text) in enumerate(zip(line, written, strict=True)):
            fill = colour(shade)
            axes.add_patch(Rectangle((column - 0.48, row - 0.46), 0.96, 0.92, facecolor=fill, linewidth=0))
            if text:
                own = {"ha": "center", "va": "center", "fontsize": points}
                axes.text(column, row, text, color=text_colour(fill), **own)  # type: ignore[arg-type]
    axes.set_xlim(-0.5, len(shades[0]) - 0.5)
    axes.set_ylim(len(shades) - 0.5, -0.5)
    for spine in axes.spines.values():
        spine.set_visible(False)


def colour(shade: float | None) -> str:
    """The colour of a shade, -1 to 1, as #rrggbb."""
    if shade is None:
        return UNKNOWN
    end, share = (DARK, shade) if shade >= 0 else (OTHER, -shade)
    mixed = (round(light + min(share, 1) * (dark - light)) for light, dark in zip(LIGHT, end, strict=True))
    return "#" + "".join(f"{each:02x}" for each in mixed)


def text_colour(fill: str) -> str:
    """Black or white, whichever has more contrast with a colour; never below 4.5."""
    return "#010101" if luminance(fill) > 0.179 else "#fefefe"


def luminance(given: str) -> float:
    """The relative luminance of #rrggbb, 0 to 1 (WCAG 2.2, "relative luminance")."""
    parts = [int(given[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

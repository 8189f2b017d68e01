"""Maps of differences over two axes, with the line where the verdict turns."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from llm3.report.plots.heat_map import ROW_INCHES, draw_cells
from llm3.report.plots.svg import INK, Margins, figure, first_of_row, shortened, text_inches

if TYPE_CHECKING:  # slow to import
    from matplotlib.axes import Axes

WIDEST = 9.0  # inches


class VerdictCell(NamedTuple):
    """A cell. better: how far ours is ahead, negative if behind. verdict: a line parts cells with different ones."""

    better: float
    text: str
    verdict: str


class VerdictPanel(NamedTuple):
    """One map: [row][column], None for a cell without a value."""

    title: str
    cells: Sequence[Sequence[VerdictCell | None]]


def plot_verdict_maps(
    panels: Sequence[VerdictPanel], rows: tuple[str, Sequence[str]], columns: tuple[str, Sequence[str]]
) -> str:
    """The maps as SVG, in the same colours. rows, columns: the name of the axis, and the names of its values."""
    known = [cell for panel in panels for line in panel.cells for cell in line if cell]
    span = max((abs(cell.better) for cell in known), default=0.0) or 1.0
    names, heads = [shortened(each, 20) for each in rows[1]], [shortened(each, 20) for each in columns[1]]
    width = max(0.6, *(text_inches(each) + 0.12 for each in [*heads, *(cell.text for cell in known)]))
    margins = Margins(left=max(map(text_inches, names)) + 0.4, right=0.25, bottom=0.15, top=0.75)
    inner = width * len(heads)
    most = max(1, int(WIDEST / (inner + margins.left + margins.right)))
    size = (max(inner, text_inches(max((each.title for each in panels), key=len), 10)), 1.2 * ROW_INCHES * len(names))
    with figure(len(panels), min(most, len(panels)), size=size, margins=margins) as drawing:
        for index, (axes, panel) in enumerate(zip(drawing.axes, panels, strict=True)):
            shades = [[None if cell is None else cell.better / span for cell in line] for line in panel.cells]
            draw_cells(axes, shades, [["" if cell is None else cell.text for cell in line] for line in panel.cells])
            _draw_turns(axes, panel)
            axes.set_title(shortened(panel.title, 60), pad=12)
            axes.set_xticks(range(len(heads)), heads)
            axes.xaxis.tick_top()
            axes.set_xlabel(shortened(columns[0], int(size[0] / text_inches("x", 9))))
            axes.xaxis.set_label_position("top")
            first = first_of_row(index, len(panels), most)
            axes.set_yticks(range(len(names)), names if first else [""] * len(names))
            axes.set_ylabel(shortened(rows[0], int(size[1] / text_inches("x", 9))) if first else "")
            axes.tick_params(length=0)
    return drawing.svg


def _draw_turns(axes: "Axes", panel: VerdictPanel) -> None:
    for x, y in turns(panel.cells):
        axes.plot(x, y, color=INK, linewidth=2.2, solid_capstyle="round")


def turns(cells: Sequence[Sequence[VerdictCell | None]]) -> Iterator[tuple[tuple[float, float], tuple[float, float]]]:
    """((x, x), (y, y)) of the edges between neighbours with different verdicts; cells stand at integer positions."""
    for row, line in enumerate(cells):
        for column, cell in enumerate(line):
            right = line[column + 1] if column + 1 < len(line) else None
            below = cells[row + 1][column] if row + 1 < len(cells) else None
            if cell and right and cell.verdict != right.verdict:
                yield (column + 0.5, column + 0.5), (row - 0.5, row + 0.5)
            if cell and below and cell.verdict != below.verdict:
                yield (column - 0.5, column + 0.5), (row + 0.5, row + 0.5)

"""The lineage of models as a graph: a box for each model, an arrow from its parent."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from llm3.report.plots.svg import BLUE, MUTED, PURPLE, Margins, figure, shortened, text_inches

if TYPE_CHECKING:  # slow to import
    from matplotlib.axes import Axes

BOX_HEIGHT, GAP, ROW_INCHES = 0.52, 0.45, 0.68  # inches


class Node(NamedTuple):
    """A model. parent: the name of another node, "" for none. note: a line below its name. aside: of a baseline."""

    name: str
    parent: str = ""
    note: str = ""
    aside: bool = False


def places(nodes: Sequence[Node]) -> dict[str, tuple[int, float]]:
    """{name: (depth, row)}: children stand right of their parent, a parent at the mean of the rows of its children.

    A node whose parent is not there counts as one without a parent. A circle is cut where it is entered.
    """
    names = {each.name for each in nodes}
    children: dict[str, list[str]] = {}
    for each in nodes:
        children.setdefault(each.parent if each.parent in names else "", []).append(each.name)
    found: dict[str, tuple[int, float]] = {}
    free = 0

    def place(name: str, depth: int) -> float:
        nonlocal free
        found[name] = (depth, 0.0)
        below = [place(child, depth + 1) for child in children.get(name, []) if child not in found]
        row = sum(below) / len(below) if below else float(free)
        free += not below
        found[name] = (depth, row)
        return row

    for name in [*children.get("", []), *(each.name for each in nodes)]:
        if name not in found:
            place(name, 0)
    return found


def plot_lineage(nodes: Sequence[Node]) -> str:
    """The graph as SVG, from the first models at the left to the last at the right; baselines have dashed boxes."""
    from matplotlib.patches import FancyBboxPatch

    found = places(nodes)
    width = max(max(text_inches(shortened(e.name, 24), 9), text_inches(e.note, 7)) for e in nodes) + 0.25
    columns, rows = max(depth for depth, _ in found.values()) + 1, max(row for _, row in found.values()) + 1
    size = (columns * (width + GAP) - GAP, rows * ROW_INCHES)
    with figure(size=size, margins=Margins(0.08, 0.08, 0.05, 0.05)) as drawing:
        (axes,) = drawing.axes
        axes.set_xlim(0, size[0])
        axes.set_ylim(size[1], 0)
        axes.axis("off")
        corners = {name: (d * (width + GAP), row * ROW_INCHES + 0.08) for name, (d, row) in found.items()}
        for node in nodes:
            x, y = corners[node.name]
            shape = FancyBboxPatch(
                (x + 0.05, y + 0.05),
                width - 0.1,
                BOX_HEIGHT - 0.1,
                boxstyle="round,pad=0.05",
                fill=False,
                edgecolor=PURPLE if node.aside else BLUE,
                linestyle="--" if node.aside else "-",
            )
            axes.add_patch(shape)
            middle = x + width / 2
            high = y + BOX_HEIGHT * (0.34 if node.note else 0.5)
            axes.text(middle, high, shortened(node.name, 24), ha="center", va="center", fontsize=9)
            axes.text(middle, y + BOX_HEIGHT * 0.72, node.note, ha="center", va="center", fontsize=7, color=MUTED)
            if node.parent in corners:
                _arrow(axes, corners[node.parent], corners[node.name], width)
    return drawing.svg


def _arrow(axes: "Axes", parent: tuple[float, float], child: tuple[float, float], width: float) -> None:
    start, end = (parent[0] + width, parent[1] + BOX_HEIGHT / 2), (child[0], child[1] + BOX_HEIGHT / 2)
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": MUTED, "shrinkA": 0, "shrinkB": 0})

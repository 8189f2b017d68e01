"""What a stage has lost since the best of its ancestors, for each text."""

from typing import NamedTuple

from llm3.report.material import Material
from llm3.report.matrix import Metric, comparable, metrics_of
from llm3.report.plots.dots import DotPanel, Dots
from llm3.report.replicates import estimate
from llm3.report.table import markdown_table
from llm3.report.units import NOT_APPLICABLE, words

LEGEND = (
    "Bits per byte of a text after a stage, less those of the best of its trained ancestors on the same documents "
    "(forgetting as defined by Chaudhry et al. 2018, section 3.2, for a loss): positive where the stage has lost "
    "something, negative where it is better than all stages before it. ± is half of the 95 % interval over seeds."
)


class Lost(NamedTuple):
    """The bits per byte that a stage lost since its best ancestor, by name."""

    bits: float
    since: str


def lost(material: Material, row: dict, metric: Metric) -> Lost | None:
    """What a stage lost in the bits per byte of a text; None without a trained ancestor that was measured alike."""
    before = [
        each
        for each in material.ancestors(row)
        if each.get("tokens") != 0 and each[metric.key] is not None and comparable(row, each, metric.evaluation)
    ]
    if not before or row[metric.key] is None:
        return None
    best = min(before, key=lambda each: each[metric.key])
    return Lost(row[metric.key] - best[metric.key], best["stage"])


def _texts(material: Material) -> list[Metric]:
    return [each for each in metrics_of(material.stages) if each.name == "bits_per_byte"]


def _by_label(material: Material, metric: Metric) -> dict[str, list[Lost]]:
    """{stage or recipe: what each of its seeds lost}"""
    label = {row["stage"]: f"{each.label} x{len(each.rows)}" for each in material.recipes for row in each.rows}
    found: dict[str, list[Lost]] = {}
    for row in material.stages:
        if (each := lost(material, row, metric)) is not None:
            found.setdefault(label.get(row["stage"], row["stage"]), []).append(each)
    return found


def section(material: Material) -> list[str]:
    """The table of what each stage lost; empty if no stage has a trained ancestor."""
    texts = _texts(material)
    columns = [_by_label(material, metric) for metric in texts]
    stages = list(dict.fromkeys(stage for column in columns for stage in column))
    if not stages:
        return []
    lines = [[stage, *(_cell(column.get(stage)) for column in columns)] for stage in stages]
    heads = ["stage", *(f"{words(metric.evaluation)} bits/byte" for metric in texts)]
    return ["## Forgetting", markdown_table(heads, lines), LEGEND]


def _cell(found: list[Lost] | None) -> str:
    if not found:
        return NOT_APPLICABLE
    bits = [each.bits for each in found]
    over = estimate(bits)
    text = f"{sum(bits) / len(bits):+.3f}" + (f" ± {over.half_width:.3f}" if over else "")
    names = list(dict.fromkeys(each.since for each in found))
    return f"{text} (since {names[0]})" if len(names) == 1 else text


def forgetting_panels(material: Material) -> list[DotPanel]:
    """A panel for each text, with a point for each seed."""
    columns = {metric: _by_label(material, metric) for metric in _texts(material)}
    stages = list(dict.fromkeys(stage for column in columns.values() for stage in column))
    panels = []
    for metric, column in columns.items():
        rows = []
        for stage in stages:
            bits = [each.bits for each in column.get(stage, [])]
            over = estimate(bits)
            rows.append(Dots(stage, bits, over and (over.mean, over.half_width)))
        if any(row.values for row in rows):
            panels.append(DotPanel(f"{words(metric.evaluation)} bits/byte lost", rows, (0.0, "best ancestor")))
    return panels

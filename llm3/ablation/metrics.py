"""The metrics of an ablation's rows: names, directions and how they are written."""

from collections.abc import Callable, Sequence
from typing import Any

from llm3.report.entries import Measure, measure_of
from llm3.report.matrix import LOWER_IS_BETTER, metrics_of
from llm3.report.table import PERCENTAGES
from llm3.report.units import words


def measures_of(rows: Sequence[dict[str, Any]]) -> list[Measure]:
    """The metrics in the tables of a report that these rows have: tasks first, then texts."""
    found = [measure_of(each) for each in metrics_of(list(rows))]
    return sorted(found, key=lambda each: each.lower_is_better)


def measure_of_key(key: str, rows: Sequence[dict[str, Any]]) -> Measure:
    """The metric with this key of a row, "EVALUATION_METRIC"; also one that the tables of a report leave out."""
    known = next((each for each in measures_of(rows) if each.key == key), None)
    if known is not None:
        return known
    names = [name for row in rows for name in (*(row.get("evaluations") or ()), *(row.get("evaluation_digests") or ()))]
    evaluation = max((each for each in names if key.startswith(f"{each}_")), key=len, default=key.partition("_")[0])
    name = key.removeprefix(f"{evaluation}_")
    declared = next((row["better"][key] for row in rows if key in (row.get("better") or ())), None)
    lower = name.endswith(LOWER_IS_BETTER) if declared is None else declared == "lower"
    return Measure(key, name, name in PERCENTAGES, lower)


def evaluation_of(measure: Measure) -> str:
    """The evaluation that a metric belongs to."""
    return measure.key.removesuffix(f"_{measure.name}")


def scale_of(measure: Measure) -> float:
    """Shown value / value."""
    return 100.0 if measure.shares else 1.0


def title_of(measure: Measure) -> str:
    """The evaluation and the metric, for people: "task accuracy"."""
    return f"{words(evaluation_of(measure))} {measure.title}"


def direction(measure: Measure) -> str:
    """Which values are better."""
    return f"{'lower' if measure.lower_is_better else 'higher'} is better"


def value_text(value: float, measure: Measure) -> str:
    """A value: in percent, else with three decimals."""
    return f"{100 * value:.1f} %" if measure.shares else f"{value:.3f}"


def number_text(value: float, measure: Measure, sign: str = "") -> str:
    """A value without its unit: percent or percentage points for a share, else with three decimals."""
    digits = 1 if measure.shares else 3
    return f"{round(scale_of(measure) * value, digits) + 0.0:{sign}.{digits}f}"  # + 0.0: no negative zero


def unit_of(measure: Measure) -> str:
    """The unit of differences, with a space before it; "" for none."""
    return " points" if measure.shares else ""


def claim_writer(measure: Measure) -> Callable[[float], str]:
    """Writes a difference with its sign and unit."""
    return lambda value: f"{number_text(value, measure, '+')}{unit_of(measure)}"

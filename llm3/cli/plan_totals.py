"""The totals of a plan: the time, the device-hours and the price of each stage and of all."""

import sys
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from llm3.report.console import new_console
from llm3.report.units import count, digits, duration, seconds

NOT_COUNTED = "without compiling, evaluating and saving"


def plan_console() -> Console:
    """A console that is wide enough for the tables of a plan, also in a file."""
    return new_console(width=None if sys.stdout.isatty() else 120)


class Total(NamedTuple):
    """What the steps of a stage take. seconds: the shortest and the longest time that is expected."""

    stage: str
    steps: int
    tokens: float
    flops: float
    seconds: tuple[float, float]


def totals_table(totals: list[Total], devices: int, price: float | None) -> Table:
    """One row per stage, and their sum. devices: that train at once. price: of a device-hour; None: not shown."""
    table = Table("stage", box=None, header_style="bold")
    heads = ["steps", "tokens", "FLOPs", "time", "device-hours", *["price"] * (price is not None)]
    for head in heads:
        table.add_column(head, justify="right")
    every = Total(
        "all",
        sum(each.steps for each in totals),
        sum(each.tokens for each in totals),
        sum(each.flops for each in totals),
        (sum(each.seconds[0] for each in totals), sum(each.seconds[1] for each in totals)),
    )
    for each in [*totals, *[every] * (len(totals) > 1)]:
        hours = [devices * each_seconds / 3600 for each_seconds in each.seconds]
        cells = [f"{each.steps:,}", count(each.tokens), count(each.flops), _range(list(map(time_text, each.seconds)))]
        cells.append(_range([digits(value) if value >= 5e-4 else "<0.001" for value in hours]))
        if price is not None:
            cells.append(_range([f"{price * value:,.2f}" if price * value >= 5e-3 else "<0.01" for value in hours]))
        table.add_row(each.stage, *cells)
    return table


def time_text(value: float) -> str:
    """A time: days and hours of a long one, milliseconds of a short one."""
    return duration(value) if value >= 60 else seconds(value)


def _range(texts: list[str]) -> str:
    return texts[0] if texts[0] == texts[1] else f"{texts[0]} to {texts[1]}"

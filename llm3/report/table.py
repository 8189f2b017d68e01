"""The matrix as a table: on a terminal, and in Markdown."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from llm3.report import cost
from llm3.report.console import new_console
from llm3.report.matrix import Metric, complete, majority, metrics_of, on_other_data
from llm3.report.replicates import collapsed
from llm3.report.units import NOT_APPLICABLE, count, duration, fixed, gibibytes, percent, signed, words

if TYPE_CHECKING:  # slow to import
    from rich.console import Console
    from rich.table import Table

WIDTH = 120
ERRORS_NOTE = "± is one standard error over the documents of an evaluation"
OTHER_DATA_NOTE = (
    "(other data): the evaluation measured this stage on other documents, or in another way, and the value does not "
    "compare with the rest of its column"
)
REPLICATES_NOTE = "A row called NAME xN is the mean over N stages that differ only in their seed"

METRIC_NAMES = {
    "bits_per_byte": "bits/byte",
    "macro_f1": "macro F1",
    "rouge_l": "ROUGE-L",
    "f1": "F1",
    "nll": "NLL, nats",
    "brier": "Brier",
    "ece": "ECE",
}
PERCENTAGES = ("accuracy", "acc", "acc_norm", "macro_f1", "exact_match", "f1", "rouge_l")


def header(metric: Metric) -> str:
    """The head of a column: the evaluation above the metric."""
    return f"{words(metric.evaluation)}\n{METRIC_NAMES.get(metric.name, words(metric.name))}"


def cell(row: dict, metric: Metric) -> str:
    """The value of a metric in a row, ± its standard error; for bits per byte also the change since the parent.

    A value that was measured on other data than most of its column says so.
    """
    value, error = row.get(metric.key), row.get(f"{metric.key}_stderr")
    show = percent if metric.name in PERCENTAGES else fixed
    text = show(value) if error is None else f"{show(value).removesuffix(' %')} ± {show(error)}"
    if value is not None and on_other_data(row, metric.evaluation):
        return f"{text} (other data)"
    change = row.get(f"{metric.key}_change")
    return text if change is None else f"{text} ({signed(change)})"


def any_errors(rows: list[dict]) -> bool:
    """Whether the table of these rows shows standard errors."""
    return any(row.get(f"{metric.key}_stderr") is not None for metric in metrics_of(rows) for row in rows)


def any_on_other_data(rows: list[dict]) -> bool:
    """Whether the table of these rows marks a value that does not compare."""
    return any(on_other_data(row, metric.evaluation) for metric in metrics_of(rows) for row in rows)


def majority_cell(row: dict, metric: Metric) -> str:
    """The accuracy of the majority class in a row."""
    return percent(majority(row, metric.evaluation))


def trained(row: dict) -> str:
    """The number of trained parameters: "0.2M of 3.4M", or one number if all were trained."""
    params, trainable = row.get("params"), row.get("trainable_params")
    if params is None or trainable is None or params == trainable:
        return count(params if trainable is None else trainable)
    return f"{count(trainable)} of {count(params)}"


COSTS = (
    ("\ntokens", lambda row: count(row["tokens"])),
    ("\nFLOPs", lambda row: count(row["flops"])),
    ("\ntime", lambda row: duration(row["seconds"])),
    ("peak\nGiB", lambda row: gibibytes(row["peak_bytes"])),
    ("trained\nparameters", trained),
)


def grid(rows: list[dict], baselines: list[dict]) -> tuple[list[str], list[list[str]], list[list[str]]]:
    """The column heads (two lines each), the cells of the rows, and the cells of the baselines."""
    rows, baselines = complete(rows, baselines)
    stages = [*rows, *baselines]
    columns: list[tuple[str, Callable[[dict], str]]] = [("\nstage", lambda row: row["stage"])]
    for metric in metrics_of(stages):
        columns.append((header(metric), partial(cell, metric=metric)))
        if metric.name == "accuracy" and any(majority(row, metric.evaluation) is not None for row in stages):
            columns.append(("majority\nclass", partial(majority_cell, metric=metric)))
    columns += COSTS
    cells, baseline_cells = ([[show(row) for _, show in columns] for row in part] for part in (rows, baselines))
    return [head for head, _ in columns], cells, baseline_cells


def print_table(rows: list[dict], baselines: list[dict], console: "Console | None" = None) -> None:
    """Print the matrix on `console` (default: standard output), at most 120 columns wide, baselines below a rule.

    Bits per byte are followed by the change since the parent, in brackets. If the console is too narrow, there are two
    tables: metrics, then costs. Replicates are shown as one row of means. If any stage has frozen parameters, another
    table shows the cost of a step.
    """
    console = console or new_console()
    if not console.is_terminal:  # rich assumes 80 columns for a file or a pipe
        console.width = WIDTH
    rows, baselines = complete(rows, baselines)
    shown, shown_baselines = collapsed(rows), collapsed(baselines)
    heads, cells, baseline_cells = grid(shown, shown_baselines)
    width = min(console.width, WIDTH)
    first_cost = len(heads) - len(COSTS)
    columns = list(range(len(heads)))
    parts = [columns]
    unbounded = console.options.update(width=10_000)
    if console.measure(_table(heads, cells, baseline_cells, columns), options=unbounded).maximum > width:
        parts = [columns[:first_cost], [0, *columns[first_cost:]]]
    for part in parts:
        console.print(_table(heads, cells, baseline_cells, part), width=width, soft_wrap=False)
    if any_errors([*shown, *shown_baselines]):
        console.print(f"{ERRORS_NOTE}.", highlight=False)
    if any_on_other_data([*shown, *shown_baselines]):
        console.print(f"{OTHER_DATA_NOTE}.", highlight=False)
    if len(shown) + len(shown_baselines) < len(rows) + len(baselines):
        console.print(f"{REPLICATES_NOTE}.", highlight=False)
    if cost.any_frozen([*rows, *baselines]):
        heads, lines = cost.savings([*shown, *shown_baselines])
        console.print("\nCost of a step (in brackets: the share of full fine-tuning)", highlight=False)
        console.print(_table(heads, lines, [], range(len(heads))), width=width, soft_wrap=False)


def _table(
    heads: list[str], cells: list[list[str]], baseline_cells: list[list[str]], columns: Sequence[int]
) -> "Table":
    """The given columns of the grid as a rich table."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.HORIZONTALS, padding=(0, 0, 0, 1), pad_edge=False, show_edge=False, header_style="bold")
    for column in columns:
        table.add_column(heads[column], justify="right" if column else "left", vertical="bottom", overflow="fold")
    for line in cells:
        table.add_row(*(line[column] for column in columns))
    table.add_section()
    for line in baseline_cells:
        table.add_row(*(line[column] for column in columns), style="italic")
    return table


def plain_table(heads: list[str], lines: list[list[str]]) -> "Table":
    """A rich table of texts."""
    return _table(heads, lines, [], range(len(heads)))


def markdown(rows: list[dict], baselines: list[dict]) -> str:
    """The matrix as a Markdown table; baselines come last, in italics."""
    heads, cells, baseline_cells = grid(rows, baselines)
    italics = [[text if text == NOT_APPLICABLE else f"*{text}*" for text in line] for line in baseline_cells]
    return markdown_table(heads, [*cells, *italics])


def markdown_table(heads: list[str], lines: list[list[str]]) -> str:
    """A Markdown table: first column left-aligned, others right-aligned; heads of two lines are joined."""
    first = [head.replace("\n", " ").strip() for head in heads]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [first, [":--", *["--:"] * (len(heads) - 1)], *lines])

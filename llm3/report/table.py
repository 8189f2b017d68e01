"""The matrix as a table: on a terminal, and in Markdown."""

from collections.abc import Iterable

from llm3.report import cost
from llm3.report.matrix import Figure, complete, figures, majority
from llm3.report.replicates import collapsed
from llm3.report.units import NOT_APPLICABLE, count, duration, fixed, gibibytes, percent, signed, words

WIDTH = 120
REPLICATES_NOTE = "A row called NAME xN is the mean over N stages that differ only by their seed"

METRIC_NAMES = {"bits_per_byte": "bits/byte", "macro_f1": "macro F1", "rouge_l": "ROUGE-L", "f1": "F1"}
PERCENTAGES = ("accuracy", "macro_f1", "exact_match", "f1", "rouge_l")


def header(figure: Figure) -> str:
    """The evaluation over the metric, as the head of a column."""
    return f"{words(figure.evaluation)}\n{METRIC_NAMES.get(figure.metric, words(figure.metric))}"


def cell(row: dict, figure: Figure) -> str:
    """The figure of a row; bits per byte with their change since the parent."""
    value = row.get(figure.key)
    if figure.metric in PERCENTAGES:
        return percent(value)
    change = row.get(f"{figure.key}_change")
    return fixed(value) if change is None else f"{fixed(value)} ({signed(change)})"


def trained(row: dict) -> str:
    """How many of the parameters the stage trained: 0.2M of 3.4M, or their number if it trained all."""
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
    """The heads of the columns (of two lines each), and the cells of the rows and of the baselines."""
    rows, baselines = complete(rows, baselines)
    stages = [*rows, *baselines]
    columns = [("\nstage", lambda row: row["stage"])]
    for figure in figures(stages):
        columns.append((header(figure), lambda row, figure=figure: cell(row, figure)))
        if figure.metric == "accuracy" and any(majority(row, figure.evaluation) is not None for row in stages):
            columns.append(("majority\nclass", lambda row, figure=figure: percent(majority(row, figure.evaluation))))
    columns += COSTS
    return [head for head, _ in columns], *(
        [[text(row) for _, text in columns] for row in part] for part in (rows, baselines)
    )


def print_table(rows: list[dict], baselines: list[dict], console=None) -> None:
    """Print the matrix on `console` (by default standard output), at most 120 columns wide, baselines under a rule.

    A change since the parent stands in brackets behind its bits per byte. Where the console is too narrow for one
    table, there are two: the figures, then what they cost. Stages that differ only by their seed are one row of means.
    Where a stage trains less than all, a last table says what a step takes.
    """
    from rich.console import Console

    console = console or Console()
    if not console.is_terminal:  # rich guesses 80 columns for a file or a pipe, which has no width
        console.width = WIDTH
    rows, baselines = complete(rows, baselines)
    shown, shown_beside = collapsed(rows), collapsed(baselines)
    heads, main, beside = grid(shown, shown_beside)
    width = min(console.width, WIDTH)
    figures_end = len(heads) - len(COSTS)
    whole = list(range(len(heads)))
    parts = [whole]
    unbounded = console.options.update(width=10_000)
    if console.measure(_table(heads, main, beside, whole), options=unbounded).maximum > width:
        parts = [whole[:figures_end], [0, *whole[figures_end:]]]
    for part in parts:
        console.print(_table(heads, main, beside, part), width=width, soft_wrap=False)
    if len(shown) + len(shown_beside) < len(rows) + len(baselines):
        console.print(f"{REPLICATES_NOTE}.", highlight=False)
    if cost.trains_a_part([*rows, *baselines]):
        heads, lines = cost.savings([*shown, *shown_beside])
        console.print("\nWhat a step takes (in brackets: the share of full fine-tuning)", highlight=False)
        console.print(_table(heads, lines, [], range(len(heads))), width=width, soft_wrap=False)


def _table(heads: list[str], main: list[list[str]], beside: list[list[str]], columns: Iterable[int]):
    """The given columns of the grid as a table of rich."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.HORIZONTALS, padding=(0, 0, 0, 1), pad_edge=False, show_edge=False, header_style="bold")
    for column in columns:
        table.add_column(heads[column], justify="right" if column else "left", vertical="bottom", overflow="fold")
    for cells in main:
        table.add_row(*(cells[column] for column in columns))
    table.add_section()
    for cells in beside:
        table.add_row(*(cells[column] for column in columns), style="italic")
    return table


def markdown(rows: list[dict], baselines: list[dict]) -> str:
    """The same matrix as a table in Markdown; baselines come last, in italics."""
    heads, main, beside = grid(rows, baselines)
    italics = [[text if text == NOT_APPLICABLE else f"*{text}*" for text in cells] for cells in beside]
    return markdown_table(heads, [*main, *italics])


def markdown_table(heads: list[str], lines: list[list[str]]) -> str:
    """A table in Markdown: the first column to the left, the others to the right; a head of two lines becomes one."""
    first = [head.replace("\n", " ").strip() for head in heads]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [first, [":--", *["--:"] * (len(heads) - 1)], *lines])

"""What an ablation shows on the terminal: its arms, the verdicts, and where the report is."""

from rich.console import Console
from rich.table import Table

from llm3.ablation.analysis import Analysis
from llm3.ablation.metrics import direction, title_of
from llm3.ablation.sections.arms import mean_text
from llm3.ablation.sections.opening import SHOWN, headline, sentences
from llm3.errors import counted
from llm3.files import REPORT, REPORT_HTML

WIDTH = 100
MOST_ARMS = 24


def print_summary(analysis: Analysis, console: Console) -> None:
    """Print the means of the arms with their intervals, the verdicts, and the place of the report."""
    study, measure = analysis.study, analysis.measure
    table = Table("arm", box=None, header_style="bold", pad_edge=False)
    table.add_column("seeds", justify="right")
    table.add_column(f"{title_of(measure)} ({direction(measure)})", justify="right")
    for each in study.variants[:MOST_ARMS]:
        values = list(analysis.values(each, measure.key).values())
        table.add_row(each.name, f"{len(study.of(each.name))} of {len(study.config.seeds)}", mean_text(values, measure))
    width = min(console.width, WIDTH)
    console.print()
    console.print(table, width=width, soft_wrap=False, markup=False)
    if len(study.variants) > MOST_ARMS:
        console.print(f"and {len(study.variants) - MOST_ARMS} more, in the report", width=width)
    console.print()
    lines = [headline(analysis)] if len(analysis.results) > SHOWN else sentences(analysis.results)
    for line in lines:
        console.print(line, width=width, soft_wrap=False, markup=False, highlight=False)
    if study.failed:
        console.print(f"{counted(len(study.failed), 'stage run')} failed; the report says why", width=width)
    console.print(f"Report: {study.workdir / REPORT_HTML}, and {REPORT} beside it", soft_wrap=True)

"""The report of an ablation: report.md and report.html in its directory, and a short table for the terminal."""

from itertools import chain
from pathlib import Path

from llm3.ablation.analysis import Analysis
from llm3.ablation.sections import arms, comparisons, grids, more, opening, origin, stages
from llm3.ablation.sections.parts import Figure, Part, Section
from llm3.ablation.study import read_study
from llm3.errors import writing
from llm3.files import REPORT_HTML
from llm3.report.html import write_page

SECTIONS: tuple[Section, ...] = (
    opening.section,
    grids.section,
    arms.section,
    comparisons.section,
    comparisons.literature,
    more.other_metrics,
    arms.trade_off,
    stages.section,
    more.what_is_needed,
    origin.failures,
    origin.differences,
    origin.reproduce,
)


def write_report(workdir: Path) -> Analysis:
    """Write the report of the ablation in a directory; equal directories give equal bytes.

    Raises UserError if it holds no ablation, NotWritten if the disk refuses.
    """
    analysis = Analysis(read_study(workdir))
    markdown, figures = page(analysis)
    with writing(workdir / REPORT_HTML):
        write_page(workdir, opening.title(analysis), markdown, figures)
    return analysis


def page(analysis: Analysis) -> tuple[str, dict[str, str]]:
    """The Markdown of the page, and its figures by name."""
    parts: list[Part] = list(chain.from_iterable(section(analysis) for section in SECTIONS))
    figures = {part.file: part.svg for part in parts if isinstance(part, Figure)}
    texts = [part.markdown if isinstance(part, Figure) else part for part in parts]
    return "\n\n".join(texts) + "\n", figures

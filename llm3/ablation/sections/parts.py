"""What the sections of an ablation's report are made of."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from llm3.ablation.analysis import Analysis
from llm3.report.escape import escaped_cell


class Figure(NamedTuple):
    """A figure of the page. name: of its file, without suffix; title: what it shows, in words."""

    name: str
    title: str
    svg: str

    @property
    def file(self) -> str:
        """The name of its file."""
        return f"{self.name}.svg"

    @property
    def markdown(self) -> str:
        """The link to it; values of a grid in its title may have brackets, which would end the link."""
        title = self.title.translate(str.maketrans("[]", "()", "\\"))
        return f"![{title}](figures/{self.file})"


Part = str | Figure
Section = Callable[[Analysis], Iterator[Part]]


def table(heads: list[str], lines: list[list[str]]) -> str:
    """A Markdown table of texts that are shown as they are; numbers stand in columns 2 and up."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in _with_rule(heads, lines))


def _with_rule(heads: list[str], lines: list[list[str]]) -> Iterator[list[str]]:
    yield [escaped_cell(head) for head in heads]
    yield [":--", *["--:"] * (len(heads) - 1)]
    for line in lines:
        yield [escaped_cell(cell) for cell in line]

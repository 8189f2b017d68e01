"""What a console prints of texts that look like markup."""

import io

from rich.table import Table

from llm3.data.cache import build
from llm3.report.console import new_console

MARKUP = "runs/w[bold]x [/x] :smile:"


def test_a_text_that_looks_like_markup_is_printed_as_it_is():
    output = io.StringIO()
    console = new_console(file=output, width=100)
    table = Table(MARKUP)
    table.add_row(MARKUP)
    console.print(MARKUP)
    console.print(table)
    assert output.getvalue().count(MARKUP) == 3


def test_the_progress_bar_of_a_file_whose_name_looks_like_markup(capsys, monkeypatch):
    for name, value in {"TTY_COMPATIBLE": "1", "TTY_INTERACTIVE": "1", "TERM": "xterm", "COLUMNS": "200"}.items():
        monkeypatch.setenv(name, value)  # else rich draws no bar, or a short one
    with build._progress(MARKUP, 1, bar=True) as advance:
        advance()
    assert "w[bold]x [/x]" in capsys.readouterr().err

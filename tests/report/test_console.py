"""What a console prints: texts that look like markup, and the line of a stage's progress."""

import io
import itertools
import re

import pytest
from rich.table import Table

from llm3.data.cache import progress
from llm3.errors import to_stderr
from llm3.report.console import Progress, counting, new_console

MARKUP = "runs/w[bold]x [/x] :smile:"


def test_a_text_that_looks_like_markup_is_printed_as_it_is():
    output = io.StringIO()
    console = new_console(file=output, width=100)
    table = Table(MARKUP)
    table.add_row(MARKUP)
    console.print(MARKUP)
    console.print(table)
    assert output.getvalue().count(MARKUP) == 3


def test_the_bar_of_a_source_whose_name_looks_like_markup_counts_documents_and_bytes(capsys, monkeypatch):
    for name, value in {"TTY_COMPATIBLE": "1", "TTY_INTERACTIVE": "1", "TERM": "xterm", "COLUMNS": "200"}.items():
        monkeypatch.setenv(name, value)  # else rich draws no bar, or a short one
    done = progress.Counts(2)
    with progress.show_progress(MARKUP, 1, done, bar=True) as advance:
        done.add(0, 3, 1_000_000)
        done.add(1, 1_000, 250_000)
        advance()
    shown = capsys.readouterr().err
    assert "w[bold]x [/x]" in shown and "0 documents, 0.0 MB" in shown and "1,003 documents, 1.2 MB" in shown


class Terminal(io.StringIO):
    """A terminal, as far as a console can tell."""

    def isatty(self):
        return True

    def text(self):
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.getvalue())


METRICS = {
    "loss": 12.345678,
    "learning_rate": 1e-3,
    "gradient_norm": 1234.5,
    "tokens_per_second": 12_345.6,
    "mfu": 0.412,
    "data_wait": 0.031,
}
IMPORTANT = "loss 12.3457  lr 1.00e-03  12.3k tok/s  ETA 2h 45m"
FURTHER = "grad 1.23e+03  MFU 41.2 %  wait 3 %"


def after_a_while(**options):
    """A progress after a minute to compile and make the first step, and then ten steps a second."""
    clock = itertools.count(0, 60)
    progress = Progress(100_000, 0, "posttrain", clock=lambda: next(clock), **options)
    progress.log(1, METRICS)
    progress.log(601, METRICS)
    return progress


def test_a_log_line_fits_120_columns_and_says_how_long_it_takes(capsys):
    after_a_while()
    slow, line = capsys.readouterr().out.splitlines()
    assert line == f"posttrain    601/100000  {IMPORTANT}  {FURTHER}"
    assert max(len(slow), len(line)) <= 120


def test_a_line_shows_the_most_important_metrics_that_fit(capsys):
    progress = after_a_while(extra={"domain_bits_per_byte": "domain bpb"})
    assert progress.line(80) == f"posttrain    601/100000  {IMPORTANT}", "all that is important, in 80 columns"
    progress.log(602, {"domain_bits_per_byte": 1.23456, "task_accuracy": 0.5})
    lines = {width: progress.line(width).split("  ")[-1] for width in (64, 97, 200)}
    assert lines == {64: "12.3k tok/s", 97: "domain bpb 1.235", 200: "wait 3 %"}, "and what `extra` does not name never"
    assert all(len(progress.line(width)) <= width for width in range(30, 160))


def test_a_metric_keeps_its_last_value_until_it_is_not_known(capsys):
    progress = Progress(10, 0, "a", clock=lambda: 0.0, extra={"task_accuracy": "acc"})
    for step, metrics in enumerate([{"loss": 1.0}, {"task_accuracy": 0.5}, {"loss": None, "mfu": None}], start=8):
        progress.log(step, metrics)
    eight, nine, ten = capsys.readouterr().out.splitlines()
    assert eight == "a          8/10  loss 1.0000"
    assert nine == "a          9/10  loss 1.0000  acc 0.5"
    assert ten == "a         10/10  acc 0.5"


def test_a_terminal_gets_one_line_that_follows_its_width():
    shown = {}
    for width in (80, 120):
        console = new_console(file=(terminal := Terminal()), width=width)
        with after_a_while(console=console):
            pass
        shown[width] = terminal.text().splitlines()[-1]
    assert shown[80] == f"posttrain    601/100000  {IMPORTANT}"
    assert shown[120] == f"posttrain    601/100000  {IMPORTANT}  {FURTHER}"
    console = new_console(file=(terminal := Terminal()), width=80)
    with Progress(100, 50, "pretrain", console, clock=lambda: 0.0) as progress:
        progress.log(60, {"loss": 1.25})
        console.print("a line above")
        console.width = 40
    line = " pretrain   60/100  loss 1.2500"
    below = terminal.text().split("a line above\n")[1]
    assert below.splitlines()[0] == "━" * 12 + "─" * 8 + line
    assert below.splitlines()[-1] == line.strip(), "no bar in a narrow terminal"


@pytest.mark.parametrize(("total", "expected"), [(100, "texts: 70 of 100 rows\n"), (None, "texts: 70 rows\n")])
def test_a_count_in_a_log_is_a_line_now_and_then(total, expected):
    clock, output = itertools.count(0, 20), io.StringIO()
    with counting(total, "texts", "rows", new_console(file=output), lambda: next(clock)) as done:
        done(50)
        done(20)
        done(30)
    assert output.getvalue() == expected


def test_a_bar_is_drawn_below_the_line_of_a_stage():
    console = new_console(file=(terminal := Terminal()), width=80)
    with Progress(100, 50, "pretrain", console, clock=lambda: 0.0) as progress:
        progress.log(60, {"loss": 1.25})
        with counting(3, "general", "documents", console) as done:
            done(3)
            console.print("a line above")
    lines = terminal.text().split("a line above\n")[1].splitlines()
    assert lines[0].endswith("60/100  loss 1.2500") and lines[1].startswith("general")


def test_a_terminal_gets_lines_that_break_between_words_and_a_file_whole_lines(monkeypatch):
    text = " ".join(["a", "sentence", "of", "words"] * 10)
    terminal, file = Terminal(), io.StringIO()
    for output in (terminal, file):
        new_console(file=output, width=40).print(text)
    assert file.getvalue() == f"{text}\n"
    lines = terminal.text().splitlines()
    assert max(map(len, lines)) <= 40 and [word for line in lines for word in line.split()] == text.split()
    monkeypatch.setenv("COLUMNS", "40")
    path = "/path" * 9
    for error, expected in ((io.StringIO(), f"{text} {path}\n"), (Terminal(), "\n".join([*lines, path, ""]))):
        monkeypatch.setattr("sys.stderr", error)
        to_stderr(f"{text} {path}")
        assert [line.rstrip() for line in error.getvalue().split("\n")] == [x.rstrip() for x in expected.split("\n")]

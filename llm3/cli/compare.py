"""The verb `compare`: two runs side by side, with what differs in their configs, tokenizers and versions."""

from pathlib import Path

from rich.console import Console

from llm3.cli.report import gather, kept_config, surroundings
from llm3.config.schema import as_dict
from llm3.report import compare as comparison
from llm3.report.console import new_console
from llm3.report.material import Material
from llm3.report.table import plain_table


def compare(runs: list[Path]) -> int:
    """Print the stages of two runs side by side, the differences right - left, and what differs between the runs.

    A metric is compared only if both runs measured it on the same data. Raises UserError for a directory without a
    finished stage.
    """
    left, right = runs
    console = new_console(soft_wrap=True)
    configs = [kept_config(run) for run in runs]
    first, second = (gather(config, run) for config, run in zip(configs, runs, strict=True))
    console.print(f"left   {left}\nright  {right}\n")
    print_rows(first, second, console)
    print_differences(console, "Config (left / right)", *map(as_dict, configs))
    print_differences(console, "Code, tokenizer and machine (left / right)", *map(surroundings, runs))
    return 0


def print_rows(first: Material, second: Material, console: Console) -> None:
    """Print the metrics of all stages that both runs have, and the names of the others."""
    found = comparison.tables(comparison.compared(first, second))
    if not found:
        console.print("No stage has the same metric in both runs.")
    for metric, lines in found.items():
        console.print(metric)
        console.print(plain_table(comparison.heads(), lines))
        console.print()
    used = {line[-1] for lines in found.values() for line in lines}
    for verdict, meaning in comparison.LEGEND.items():
        if verdict in used:
            console.print(f"{verdict}: {meaning}")
    for side, own, other in (("left", first, second), ("right", second, first)):
        if alone := comparison.alone(own, other):
            console.print(f"only {side}: {', '.join(alone)}")


def print_differences(console: Console, title: str, left: dict, right: dict) -> None:
    """Print the fields in which two dicts differ."""
    found = list(comparison.field_differences(left, right))
    console.print(f"\n{title}")
    console.print("\n".join(f"  {line}" for line in found) or "  no difference")

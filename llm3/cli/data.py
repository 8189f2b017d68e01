"""The verb `data`: the documents of a run as the model sees them."""

import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from rich.table import Table
from rich.text import Text

from llm3.cli.checks import shard_of
from llm3.cli.overlap import print_overlaps
from llm3.cli.token_text import marked, piece
from llm3.config.schema import RunConfig
from llm3.data.library import Library
from llm3.errors import counted, listed
from llm3.report.console import WARNING, new_console
from llm3.report.units import count, percent
from llm3.stages import rules
from llm3.stages.data_sample import data_sample
from llm3.stages.experiment import prepare, read_library
from llm3.stages.stage import Stage

SHOWN_ROWS, SHOWN_CLASSES = 10, 20


def data(config: RunConfig, workdir: Path, stages: list[str] | None = None, shard: str | None = None) -> int:
    """Print each stage's sources, mixed and packed, and ten decoded rows of its first batches.

    Tokenizes the documents into the cache and writes nothing else. shard: "I/N", tokenize only this shard. Raises
    UserError.
    """
    order = rules.chosen(config, stages)
    if shard:
        return build_shard(config, workdir, order, shard)
    console = new_console(width=None if sys.stdout.isatty() else 120)
    experiment = prepare(config, workdir, order)
    for stage in experiment.stages.values():
        own = stage.config
        shape = f"{own.batch_size} x {own.sequence_length} tokens per step, {counted(own.steps, 'step')}"
        console.print(f"\n{stage.name}: {own.objective_name}, {shape}")
        console.print(source_table(stage))
        for warning in stage.data.warnings(f"{stage.where}.sequence_length"):
            console.print(warning, style=WARNING)
        for first, weights in stage.data.schedule[1:]:
            console.print(f"  from step {first}: " + ", ".join(f"{s} {percent(w)}" for s, w in shares(weights).items()))
        for source, tokens in stage.data.caches.items():
            for reason, rows in tokens.bad.items():
                console.print(f"  {source}: {counted(rows, 'row')} set aside: {reason}")
            if tokens.round_trip is not None:
                console.print(f"  {source}: {tokens.round_trip.phrase()}")
            if stage.objective.HEAD == "labels":
                for line in class_lines(tokens.class_counts()):
                    console.print(Text(f"  {source}: {line}"))
        console.print(f"  ten rows of the first batches, with targets {marked('marked', sys.stdout.isatty())}:")
        for window in data_sample(stage, SHOWN_ROWS):
            console.print(Text("  | ") + Text.assemble(*(piece(text, is_target) for text, is_target in window)))
    print_overlaps(experiment, console)
    return 0


def build_shard(config: RunConfig, workdir: Path, order: list[str], shard: str) -> int:
    """Tokenize one shard of the training documents, as a task of an array job. Raises UserError."""
    share = shard_of(shard)
    library: Library = read_library(config, workdir)
    for source in dict.fromkeys(source for name in order for source in rules.data_sources(config, name)):
        built = library.build_split(source, "train", shard=share)
        state = "other shards are not built yet" if built is None else f"complete, {built.tokens:,} tokens"
        print(f"{source}: shard {shard} is built; {state}", flush=True)
    return 0


def shares(weights: dict[str, float]) -> dict[str, float]:
    """Weights as shares of their sum."""
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


def source_table(stage: Stage) -> Table:
    """One row per source: its size, packing, share of the mixture and epochs."""
    data = stage.data
    table = Table("source", box=None, header_style="bold")
    for column in (
        "documents",
        "tokens",
        "bytes/token",
        "windows",
        "padding",
        "truncated",
        "dropped",
        "share",
        "epochs",
    ):
        table.add_column(column, justify="right")
    weights, epochs = shares(data.schedule[0][1]), data.mixture.epochs(stage.config.steps)
    for source, windows in data.tables.items():
        tokens = data.caches[source]
        text_tokens = tokens.tokens - 2 * tokens.documents  # without <bos>, or the first token, and without <eos>
        table.add_row(
            source,
            f"{tokens.documents:,}",
            count(tokens.tokens),
            f"{tokens.text_bytes / max(text_tokens, 1):.2f}",
            f"{len(windows):,}",
            percent(windows.waste),
            f"{windows.truncated:,}",
            f"{windows.dropped:,}",
            percent(weights.get(source, 0.0)),
            f"{epochs[source]:.2g}",
        )
    return table


def class_lines(counts: dict[str, int]) -> Iterator[str]:
    """Phrases on the classes of a source. counts: {class: documents}, the most frequent first."""
    shown = [f"{name!r} {documents:,}" for name, documents in counts.items()]
    yield f"{len(counts):,} classes: {listed(shown, SHOWN_CLASSES)}"
    alike: dict[str, list[str]] = {}
    for name in counts:
        alike.setdefault(" ".join(unicodedata.normalize("NFKC", name).casefold().split()), []).append(name)
    for names in alike.values():
        if len(names) > 1:
            same = "differ in white space, letter case or Unicode form only"
            yield f"suspicious classes: {', '.join(map(repr, names))} {same}"

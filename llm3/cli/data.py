"""The verb `data`: the documents of a run as the model sees them."""

import itertools
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.table import Table
from rich.text import Text

from llm3.cli.checks import shard_of
from llm3.cli.overlap import print_overlaps
from llm3.cli.token_text import marked, piece, spelled
from llm3.config.schema import RunConfig
from llm3.data.batch import Batch
from llm3.data.library import Library
from llm3.data.tokenizer import Tokenizer
from llm3.errors import counted, listed
from llm3.report.console import WARNING, new_console
from llm3.report.units import count, percent
from llm3.stages import rules
from llm3.stages.experiment import prepare, read_library
from llm3.stages.stage import Stage

SHOWN_ROWS, SHOWN_TOKENS, SHOWN_CLASSES = 10, 96, 20


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
        for row in first_rows(stage):
            console.print(Text("  | ") + decoded(stage, row))
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


def first_rows(stage: Stage) -> list[Batch]:
    """The first rows that a stage trains on, without the batch axis."""
    size = stage.config.batch_size
    rows = (divmod(row, size) for row in range(SHOWN_ROWS))
    batches = (stage.data.mixture.batch(step, [row]) for step, row in rows)
    return [Batch(*(field[0] for field in batch)) for batch in batches]


def decoded(stage: Stage, row: Batch) -> Text:
    """The beginning of a row as text, with its targets marked."""
    parts = (_labels if stage.objective.HEAD else _tokens)(stage, row)
    return Text.assemble(*(piece(text, is_target) for text, is_target in parts))


def _tokens(stage: Stage, row: Batch) -> list[tuple[str, bool]]:
    """Runs of tokens that are or are not targets: next tokens or, in a bidirectional model, hidden tokens."""
    tokens, targets = [], []
    for segment in range(1, int(row.segments.max(initial=0)) + 1):
        positions = np.flatnonzero(row.segments == segment)
        weighted = row.weights[positions] > 0
        if stage.objective.CAUSAL is False:
            tokens.append(np.where(weighted, row.targets[positions], row.tokens[positions]))
            targets.append(weighted)
        else:  # a target is the token after its position; the last target is not an input
            tokens.append(np.append(row.tokens[positions], row.targets[positions[-1:]][weighted[-1:]]))
            targets.append(np.concatenate([[False], weighted])[: len(tokens[-1])])
    text, marks = np.concatenate(tokens), np.concatenate(targets)
    first = int(np.argmax(marks)) if marks.any() else 0
    if first < SHOWN_TOKENS * 3 // 4:
        return _runs(text[:SHOWN_TOKENS], marks[:SHOWN_TOKENS], stage.task.tokenizer)
    third = SHOWN_TOKENS // 3  # the first target comes late, as after a long prompt
    around = slice(first - third, first + third)
    begin = (spelled(text[:third], stage.task.tokenizer) + " ... ", False)
    return [begin, *_runs(text[around], marks[around], stage.task.tokenizer)]


def _runs(tokens: np.ndarray, marks: np.ndarray, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    bounds = [0, *(np.flatnonzero(marks[1:] != marks[:-1]) + 1), len(tokens)]
    runs = itertools.pairwise(bounds)
    return [(spelled(tokens[first:last], tokenizer), bool(marks[first])) for first, last in runs]


def _labels(stage: Stage, row: Batch) -> list[tuple[str, bool]]:
    """Documents, each with the target of the task head."""
    labels, parts = stage.labels, []
    sets = stage.task.label_sets
    for segment in range(1, int(row.segments.max(initial=0)) + 1):
        positions = np.flatnonzero(row.segments == segment)
        parts.append((spelled(row.tokens[positions[:SHOWN_TOKENS]], stage.task.tokenizer), False))
        if stage.objective.HEAD == "labels":
            target = int(row.targets[positions][row.weights[positions] > 0][0])
            classes = [target] if sets is None else np.flatnonzero(sets[target])
            parts.append((", ".join(labels[each] for each in classes) or "none", True))
        else:  # bits 1 and 2 of the targets mark the first and the last token of the answer
            first, last = (positions[np.flatnonzero(row.targets[positions] & bit)] for bit in (1, 2))
            parts.append((spelled(row.tokens[int(first[0]) : int(last[0]) + 1], stage.task.tokenizer), True))
    return parts

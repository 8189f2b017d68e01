"""The verb `overlap`: what the evaluations share with the training data, and what to leave out for them."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llm3.cli.token_text import piece
from llm3.config.schema import RunConfig
from llm3.data.cache.token_cache import TokenCache
from llm3.data.passages import find_overlapping, find_passages
from llm3.data.sources import split as sources
from llm3.data.sources.drop import drop_lines
from llm3.errors import counted, writing
from llm3.files import local_path, write_atomic
from llm3.report.console import new_console
from llm3.report.units import percent
from llm3.stages import rules
from llm3.stages.data_sample import spelled
from llm3.stages.evaluation import Evaluation
from llm3.stages.experiment import Experiment, prepare

AROUND, SHOWN = 16, 64  # tokens around a passage, and of it, that are printed


def overlap(
    config: RunConfig, workdir: Path, stages: list[str] | None = None, show: int = 3, drop: Path | None = None
) -> int:
    """Print the overlap of each evaluation with the training data of the stages, and passages that they share.

    show: the evaluation documents with most overlap whose passages are printed. drop: a new file for the training
    documents to leave out, which sources name as `drop`. Raises UserError, and NotWritten.
    """
    console = new_console(width=None if sys.stdout.isatty() else 120)
    experiment = prepare(config, workdir, rules.chosen(config, stages))
    print_overlaps(experiment, console)
    for evaluation in measured(experiment) if show else ():
        for passage in passage_lines(experiment, evaluation, show):
            console.print(passage, soft_wrap=True)
    if drop is not None:
        for line in write_drop(experiment, drop):
            console.print(line, soft_wrap=True)
    return 0


def print_overlaps(experiment: Experiment, console: Console) -> None:
    """Print a table of how many documents of each evaluation overlap with the training data."""
    table = Table("evaluation", box=None, header_style="bold")
    for column in ("documents", "equal", "near duplicates", "any n-gram"):
        table.add_column(column, justify="right")
    for name, found in experiment.overlaps().items():
        table.add_row(name, *(f"{each:,}" for each in (found.documents, found.exact, found.near, found.any)))
    console.print(
        "\nOverlap of the evaluations with the training data, by 13-grams; near duplicates share half or more of them"
    )
    console.print(table)
    for name, found in experiment.overlaps().items():
        rows = ", ".join(f"{row} ({percent(share)})" for row, share in found.worst)
        console.print(f"  {name}: highest overlap in rows {rows}" if rows else f"  {name}: no overlap")


def measured(experiment: Experiment) -> Iterator[Evaluation]:
    """The evaluations that share an n-gram with the training data."""
    overlaps = experiment.overlaps()
    return (each for each in experiment.evaluations if each.name in overlaps and overlaps[each.name].any)


def passage_lines(experiment: Experiment, evaluation: Evaluation, most: int) -> Iterator[Text]:
    """The evaluation documents with most overlap, each above the training document that has most of its n-grams."""
    cache, training = _documents(evaluation), experiment.training_beside(evaluation)
    for each in find_passages(cache, training, most):
        other = training[each.source]
        rows = int(cache.rows[each.document]), int(other.rows[each.training_document])
        yield Text(
            f"\n{evaluation.name} row {rows[0]}, {percent(each.share)} of its 13-grams; most of them in {each.source} "
            f"row {rows[1]}, the longest passage {counted(each.length, 'token')}:"
        )
        places = ((cache, each.document, each.start), (other, each.training_document, each.training_start))
        for where, index, start in places:
            yield _marked(experiment, where.document(index)[where.starts : -1], start, start + each.length)


def _documents(evaluation: Evaluation) -> TokenCache:
    assert evaluation.cache is not None  # the others overlap with nothing
    return evaluation.cache


def _marked(experiment: Experiment, tokens: np.ndarray, start: int, stop: int) -> Text:
    """The passage tokens[start:stop], marked, with what is around it."""
    first, last = max(start - AROUND, 0), min(stop + AROUND, len(tokens))
    shown = [spelled(tokens[first:start], experiment.tokenizer)]
    passage = (
        [tokens[start:stop]]
        if stop - start <= SHOWN
        else [tokens[start : start + SHOWN // 2], tokens[stop - SHOWN // 2 : stop]]
    )
    shown.append(" ... ".join(spelled(part, experiment.tokenizer) for part in passage))
    shown.append(spelled(tokens[stop:last], experiment.tokenizer))
    before, after = "... " if first else "", " ..." if last < len(tokens) else ""
    return Text.assemble("  | ", before, piece(shown[0], False), piece(shown[1], True), piece(shown[2], False), after)


def write_drop(experiment: Experiment, file: Path) -> Iterator[str]:
    """Write the training documents that share 13 tokens with an evaluation, and yield what to do with the file.

    Documents that the sources leave out already are in the file too.
    """
    rows: dict[str, dict[int, list[str]]] = {}
    for evaluation in measured(experiment):
        training = experiment.training_beside(evaluation)
        found = find_overlapping(_documents(evaluation), training)
        for source, documents in found.documents.items():
            for row in training[source].rows[documents].tolist():
                rows.setdefault(source, {}).setdefault(row, []).append(evaluation.name)
        if found.kept:
            yield (
                f"  {evaluation.name}: {counted(found.kept, 'document')} shorter than 13 tokens inside longer training "
                "documents, which stay"
            )
    if not rows:
        yield f"No training document has to be left out: {file} is not written"
        return
    library, lines, before = experiment.library, list[str](), dict[str, None]()
    for source, of_source in sorted(rows.items()):
        config = sources.expanded(library.configs[source])
        if config.drop:
            before |= dict.fromkeys(local_path(config.drop, "drop").read_text(encoding="utf-8").splitlines())
        records = sources.open_split(config, "train", cache_dir=library.cache_dir)
        lines += map(json.dumps, drop_lines(source, records, of_source))
        total = counted(library.cache(source, "train").documents, "document")
        yield f"  {source}: {len(of_source):,} of {total} left out"
    with writing(file):
        write_atomic(file, "".join(f"{line}\n" for line in [*before, *lines]))
    fields = " ".join(f"--config.sources.{source}.drop={file}" for source in sorted(rows))
    yield f"{file} is written. Leave these documents out with {fields}"

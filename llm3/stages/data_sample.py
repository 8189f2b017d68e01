"""The first windows of a stage as text, with the targets of the loss."""

import itertools

import numpy as np

from llm3.data.batch import Batch
from llm3.data.tokenizer import Tokenizer
from llm3.stages.stage import Stage

SHOWN_TOKENS = 96  # of a window, or of a document with a label

Piece = tuple[str, bool]  # text, whether its tokens are targets


def data_sample(stage: Stage, windows: int) -> list[list[Piece]]:
    """The beginnings of the first windows that a stage trains on."""
    return [pieces(stage, row) for row in first_rows(stage, windows)]


def first_rows(stage: Stage, number: int) -> list[Batch]:
    """The first rows that a stage trains on, without the batch axis."""
    size = stage.history[0][1].batch_size
    rows = (divmod(row, size) for row in range(number))
    batches = (stage.data.mixture.batch(step, [row]) for step, row in rows)
    return [Batch(*(field[0] for field in batch)) for batch in batches]


def pieces(stage: Stage, row: Batch) -> list[Piece]:
    """The beginning of a row as pieces of text."""
    return (_labels if stage.objective.HEAD else _tokens)(stage, row)


def _tokens(stage: Stage, row: Batch) -> list[Piece]:
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


def _runs(tokens: np.ndarray, marks: np.ndarray, tokenizer: Tokenizer) -> list[Piece]:
    bounds = [0, *(np.flatnonzero(marks[1:] != marks[:-1]) + 1), len(tokens)]
    runs = itertools.pairwise(bounds)
    return [(spelled(tokens[first:last], tokenizer), bool(marks[first])) for first, last in runs]


def _labels(stage: Stage, row: Batch) -> list[Piece]:
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


def spelled(tokens: np.ndarray, tokenizer: Tokenizer) -> str:
    """Tokens as one line of text, with special tokens by name."""
    runs: list[str] = []
    text: list[int] = []
    special = set(tokenizer.specials.values())
    for token in tokens.tolist():
        if token in special:
            runs += [tokenizer.decode(text), tokenizer.tokens[token]]
            text = []
        else:
            text.append(token)
    return "".join([*runs, tokenizer.decode(text)]).replace("\n", "⏎")

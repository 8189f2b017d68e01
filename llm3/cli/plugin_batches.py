"""Batches of a few random documents, as the windows of an objective would cut them."""

from typing import Any

import numpy as np

from llm3.data.batch import Batch
from llm3.data.windows.spans import CHOICE, END, START

CLASSES = 5
VOCAB = 61  # less than any tokenizer has


class Packed:
    """Windows with two documents each, and then padding. kinds: of windows, which decide the targets."""

    LENGTH, ROWS = 16, 4

    def __init__(self, kinds: set[str]):
        self._kinds, rng = kinds, np.random.default_rng(0)
        self._documents = [rng.integers(4, VOCAB, rng.integers(3, 8)) for _ in range(2 * self.ROWS)]
        self._classes = rng.integers(0, CLASSES, 2 * self.ROWS)

    def batch(self) -> Batch:
        """All documents, two in a row."""
        return self._stack([self._row([2 * i, 2 * i + 1]) for i in range(self.ROWS)])

    def rows(self) -> list[Batch]:
        """The rows of `batch`, each with empty rows."""
        return [self._padded(self._row([2 * i, 2 * i + 1])) for i in range(self.ROWS)]

    def alone(self) -> list[Batch]:
        """Each document in a window of its own."""
        return [self._padded(self._row([i])) for i in range(2 * self.ROWS)]

    def unweighted(self) -> Batch:
        """All documents, without a target."""
        batch = self.batch()
        return batch._replace(weights=np.zeros_like(batch.weights))

    def empty(self) -> Batch:
        """Padding alone."""
        return self._padded(self._row([]))

    def _padded(self, row: Batch) -> Batch:
        return self._stack([row, *[self._row([])] * (self.ROWS - 1)])

    @staticmethod
    def _stack(rows: list[Batch]) -> Batch:
        return Batch(*(np.stack(each) for each in zip(*rows, strict=True)))

    def _row(self, numbers: list[int]) -> Batch:
        names = Batch._fields
        row = Batch(*(np.zeros(self.LENGTH, np.float32 if name == "weights" else np.int32) for name in names))
        start = 0
        for segment, number in enumerate(numbers, start=1):
            tokens = self._documents[number]
            place, last = slice(start, start + len(tokens)), start + len(tokens) - 1
            row.tokens[place], row.positions[place], row.segments[place] = tokens, np.arange(len(tokens)), segment
            if "examples" in self._kinds:  # the class of each document, at its last token
                row.targets[last], row.weights[last] = self._classes[number], 1
            elif "spans" in self._kinds:  # the answer is the second token; every token may be chosen
                row.targets[place], row.weights[start] = CHOICE, 1
                row.targets[start + 1] |= START | END
            else:  # the next token
                row.targets[start:last], row.weights[start:last] = tokens[1:], 1
            start = place.stop
        return row


def documents_for(plugin: Any) -> Packed:
    """Documents with the targets that an objective has."""
    return Packed(set(plugin.WINDOWS.values()))

"""Questions with the contexts that answer them."""

import numpy as np

from llm3.config.schema import at_least
from llm3.data.batch import Batch
from llm3.data.cache.cache import TokenCache
from llm3.data.packing import Packed, checked, empty_window, mark
from llm3.data.tokenizer import Tokenizer

START, END, CHOICE = 1, 2, 4  # bits of a target: the answer starts here, ends here; the position may be chosen
SHORTEST = 8  # of windows: a question of half of it leaves room for a token of the context
SPECIALS_IN_CHUNK = 3  # [bos] question [eos] part of the context [eos]


class Table:
    """Reading comprehension: whole chunks [bos] question [eos] part of the context [eos], packed into windows.

    A context that does not fit is cut into parts that overlap by half, each with the question. Targets are bits: the
    tokens of the part and <bos>, which stands for "no answer here", are marked CHOICE, the first answer START and END;
    of a chunk that does not hold all of it, <bos> is both. The weight is 1 at each chunk's <bos>, an example.

    dropped: documents whose question is longer than T / 2, which are left out, and those of whose chunks none holds
    the answer, which stay with weight 0. No document loses tokens otherwise: truncated is 0.
    """

    truncated = 0

    def __init__(self, cache: TokenCache, length: int):
        """Raises UserError if length < 8."""
        at_least("sequence_length", length, SHORTEST)
        self._cache = cache
        sizes, questions = np.diff(cache.offsets), np.zeros(cache.documents, np.int64)
        for document in range(cache.documents):
            questions[document] = np.argmax(cache.document(document) == Tokenizer.eos_id) - 1
        contexts, room = sizes - questions - SPECIALS_IN_CHUNK, length - questions - SPECIALS_IN_CHUNK
        self._fits = questions <= length // 2
        strides = np.maximum(room // 2, 1)
        chunks = np.where(self._fits, 1 + -(-np.maximum(contexts - room, 0) // strides), 0)
        self._document = np.repeat(np.arange(cache.documents), chunks)
        number = np.arange(len(self._document)) - np.repeat(np.cumsum(chunks) - chunks, chunks)
        self._before = (questions + 2)[self._document]  # the tokens of a chunk before its part
        self._first = self._before + number * strides[self._document]  # token of the document where a part starts
        self._parts = np.minimum(room[self._document], sizes[self._document] - 1 - self._first)
        self.documents = int(self._fits.sum())
        self._packed = Packed(self._before + self._parts + 1, length)
        self.waste = self._packed.waste
        self._answered = self._documents_with_their_answer()
        self.dropped = int(np.sum(~self._answered))

    def _documents_with_their_answer(self) -> np.ndarray:
        """Which documents a chunk of theirs holds the answer of, or have none: bool [documents]."""
        found = np.zeros(self._cache.documents, bool)
        for chunk, document in enumerate(self._document):
            if not found[document]:
                spans = self._cache.note(document)["spans"]
                found[document] = not spans or self._holds(chunk, spans[0])
        return found

    def _holds(self, chunk: int, span: list[int]) -> bool:
        first = self._first[chunk]
        return first <= span[0] and span[1] < first + self._parts[chunk]

    def __len__(self) -> int:
        return len(self._packed)

    def __getitem__(self, index: int) -> Batch:
        window = empty_window(self._packed.length)
        for segment, chunk, place in self._packed.layout(checked(index, self)):
            document = int(self._document[chunk])
            before, first, part = self._before[chunk], self._first[chunk], self._parts[chunk]
            tokens = self._cache.document(document)
            context = place.start + before
            window.tokens[place.start : context] = tokens[:before]
            window.tokens[context : context + part] = tokens[first : first + part]
            window.tokens[place.stop - 1] = tokens[-1]
            window.targets[context : context + part] = CHOICE
            window.targets[place.start] = CHOICE
            spans = self._cache.note(document)["spans"]
            held = bool(spans) and self._holds(chunk, spans[0])
            start, end = (context - first + np.array(spans[0])) if held else (place.start, place.start)
            window.targets[start] |= START
            window.targets[end] |= END
            window.weights[place.start] = self._answered[document]
            mark(window, place, segment)
        return window

    def documents_of(self, index: int) -> list[tuple[int, int, tuple[int, int]]]:
        """(segment, document, (first, stop) tokens of the document that are the chunk's part of the context)."""
        chunks = [(segment, chunk) for segment, chunk, _ in self._packed.layout(checked(index, self))]
        starts = [(segment, chunk, int(self._first[chunk])) for segment, chunk in chunks]
        return [(s, int(self._document[chunk]), (first, first + int(self._parts[chunk]))) for s, chunk, first in starts]

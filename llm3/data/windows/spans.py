"""Questions with contexts that hold their answers."""

import numpy as np

from llm3.data.batch import Batch
from llm3.data.cache.token_cache import TokenCache
from llm3.data.packing import PackedWindows
from llm3.errors import at_least

START, END, CHOICE = 1, 2, 4  # bits of a target: the answer starts here; ends here; a prediction may choose it
SHORTEST = 8  # shortest window: a question of half its length leaves room for a token of the context


class WindowTable(PackedWindows):
    """Reading comprehension: chunks [bos] question [eos] part of the context [eos], packed into windows.

    Where the tokenizer has no bos, the first token of the question takes its place.

    A context that does not fit is cut into parts that overlap by half, each behind the question. Targets are bits:
    - CHOICE marks <bos> ("no answer here") and the tokens of the part;
    - START and END mark the first answer, or both mark <bos> if the chunk does not hold the whole answer.
    A chunk is one example: the weight is 1 at its <bos>.

    dropped counts two kinds of documents: a question longer than T / 2 gets no window; an answer that no chunk holds
    whole gets weight 0. No other document loses tokens: truncated is 0.
    """

    def __init__(self, cache: TokenCache, length: int):
        """Raises UserError if length < 8."""
        at_least("sequence_length", length, SHORTEST)
        self._cache = cache
        sizes = np.diff(cache.offsets)
        before = np.array([cache.note(index)["context"] for index in range(cache.documents)], np.int64)
        questions = before - 1 - cache.starts
        contexts, room = sizes - before - 1, length - before - 1
        fits = questions <= length // 2
        strides = np.maximum(room // 2, 1)
        chunks = np.where(fits, 1 + -(-np.maximum(contexts - room, 0) // strides), 0)
        document = np.repeat(np.arange(cache.documents), chunks)
        number = np.arange(len(document)) - np.repeat(np.cumsum(chunks) - chunks, chunks)
        self._before = before[document]  # tokens of a chunk before its part of the context
        first = self._before + number * strides[document]  # where a part starts, in tokens of the document
        parts = np.minimum(room[document], sizes[document] - 1 - first)
        self.documents = int(fits.sum())
        super().__init__(self._before + parts + 1, length, document, first, first + parts)
        self._answered = self._documents_with_their_answer()
        self.dropped = int(np.sum(~self._answered))

    def _documents_with_their_answer(self) -> np.ndarray:
        """bool [documents], True for documents with a chunk that holds the first answer, or without an answer."""
        found = np.zeros(self._cache.documents, bool)
        for chunk, document in enumerate(self._document.tolist()):
            if not found[document]:
                spans = self._cache.note(document)["spans"]
                found[document] = not spans or self._holds(chunk, spans[0])
        return found

    def _holds(self, chunk: int, span: list[int]) -> bool:
        return self._first[chunk] <= span[0] and span[1] < self._stop[chunk]

    def _fill(self, window: Batch, piece: int, place: slice) -> None:
        document, (first, stop) = self._tokens_of(piece)
        tokens = self._cache.document(document)
        before, context = self._before[piece], slice(place.start + self._before[piece], place.stop - 1)
        window.tokens[place.start : context.start] = tokens[:before]
        window.tokens[context] = tokens[first:stop]
        window.tokens[place.stop - 1] = tokens[-1]
        window.targets[context] = CHOICE
        window.targets[place.start] = CHOICE
        spans = self._cache.note(document)["spans"]
        held = bool(spans) and self._holds(piece, spans[0])
        start, end = (context.start - first + np.array(spans[0])) if held else (place.start, place.start)
        window.targets[start] |= START
        window.targets[end] |= END
        window.weights[place.start] = self._answered[document]

"""The text of an answer while it is made: whole characters only, and nothing of a stop string."""

from collections.abc import Callable, Sequence

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what a decoder makes of the first bytes of a character


class TextStream:
    """Turns the tokens of an answer so far into the text that is certain.

    decode(tokens): their text. stops: strings that end the answer. `ended`: whether one did.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()):
        self._decode, self._stops = decode, [each for each in stops if each]
        self.text, self.ended = "", False

    def add(self, tokens: list[int], complete: bool) -> str:
        """The text that is new. tokens: all of the answer so far. complete: no more tokens will come."""
        if self.ended:
            return ""
        text = self._decode(tokens)
        if found := [place for each in self._stops if (place := text.find(each)) >= 0]:
            text, self.ended = text[: min(found)], True
        elif not complete:
            text = text.rstrip(INCOMPLETE)
            text = text[: len(text) - self._held_back(text)]
        if not text.startswith(self.text):  # a decoder that changes what it said before: wait for what it agrees on
            if not (complete or self.ended):
                return ""
            text = self.text + text[len(self.text) :]
        new, self.text = text[len(self.text) :], text
        return new

    def covered(self, tokens: list[int]) -> int:
        """The number of the first tokens that hold all of the text."""
        return next((n for n in range(len(tokens)) if len(self._decode(tokens[:n])) >= len(self.text)), len(tokens))

    def _held_back(self, text: str) -> int:
        """The characters at the end of the text that may be the beginning of a stop."""
        return max(
            (size for each in self._stops for size in range(1, len(each)) if text.endswith(each[:size])), default=0
        )

"""The text of an answer while it is made: whole characters only, and nothing of a stop string; the texts of tokens."""

from collections.abc import Callable, Sequence

from llm3.data.prompts import CONTEXT
from llm3.data.tokenizer import Tokenizer

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
        return next((n for n in range(len(tokens)) if self._decode(tokens[:n]).startswith(self.text)), len(tokens))

    def _held_back(self, text: str) -> int:
        """The characters at the end of the text that may be the beginning of a stop."""
        return max(
            (size for each in self._stops for size in range(1, len(each)) if text.endswith(each[:size])), default=0
        )


class TokenTexts:
    """The part of a text that each of its tokens adds; a character belongs to the token that completes it.

    before: tokens before the text.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()):
        self._decode, self._tokens = tokenizer.decode, list(before[-CONTEXT:])
        self._given = len(self._decode(self._tokens))  # characters

    def add(self, tokens: Sequence[int], complete: bool = False) -> list[str]:
        """The parts of the next tokens. complete: no more will come, so the last part has incomplete characters too."""
        return [self._add(each, complete and place == len(tokens)) for place, each in enumerate(tokens, 1)]

    def _add(self, token: int, last: bool) -> str:
        self._tokens.append(token)
        whole = self._decode(self._tokens)
        certain = whole if last else whole.rstrip(INCOMPLETE)
        part, self._given = certain[self._given :], max(self._given, len(certain))
        if certain == whole and part:  # the token that ends this part is context enough for the next ones
            self._tokens = [token]
            self._given = len(self._decode(self._tokens))
        return part


def token_name(tokenizer: Tokenizer, token: int) -> str:
    """A token as text: a special token by its name, incomplete characters by their bytes, as OpenAI writes them."""
    written = tokenizer.token_bytes[token]
    try:
        return written.decode() if written else tokenizer.tokens[token]
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{each:02x}" for each in written)

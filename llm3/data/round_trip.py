"""How much of the texts of a source their tokens hold: normalizers and unknown tokens lose some."""

import collections
from collections.abc import Sequence
from typing import NamedTuple

from llm3.errors import counted


class RoundTrip(NamedTuple):
    """Documents, those whose texts come back exactly when they are decoded, characters, and those that are lost.

    A character is lost if the decoded text has it less often.
    """

    documents: int = 0
    exact: int = 0
    characters: int = 0
    lost: int = 0

    def plus(self, other: Sequence[int]) -> "RoundTrip":
        """The sum of two counts."""
        return RoundTrip(*(a + b for a, b in zip(self, other, strict=True)))

    def phrase(self) -> str:
        """The counts in words."""
        exact, lost = self.exact / max(self.documents, 1), self.lost / max(self.characters, 1)
        return (
            f"{100 * exact:.1f} % of {counted(self.documents, 'document')} come back exactly from their tokens, "
            f"{100 * lost:.2g} % of the characters are lost"
        )


def compare(texts: Sequence[str], decoded: Sequence[str]) -> RoundTrip:
    """The count of one document, from its texts and what their tokens decode to."""
    lost = sum(
        sum((collections.Counter(text) - collections.Counter(back)).values())
        for text, back in zip(texts, decoded, strict=True)
        if text != back
    )
    return RoundTrip(1, int(list(texts) == list(decoded)), sum(map(len, texts)), lost)

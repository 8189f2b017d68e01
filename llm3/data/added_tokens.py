"""New tokens of a vocabulary, as tokenizer.json holds them."""

from collections.abc import Mapping, Sequence
from typing import Any

from llm3.errors import UserError


def added_tokens(
    tokens: Sequence[str], known: Mapping[bytes, int], ids: Mapping[str, int], specials: Mapping[str, int], first: int
) -> list[dict[str, Any]]:
    """The entries of new tokens with ids from `first`. known: {bytes that a token writes: id}. ids: {token: id}.

    Raises UserError for a token that is empty, named twice, or already in the vocabulary.
    """
    added: list[dict[str, Any]] = []
    for place, token in enumerate(tokens):
        where = f"tokenizer.add[{place}]={token!r}"
        if not token:
            raise UserError(f"{where}: expected at least one character")
        try:
            taken = known.get(token.encode(), ids.get(token))
        except UnicodeEncodeError:
            raise UserError(f"{where}: not a valid Unicode text") from None
        if taken is not None:
            kind = "a special token" if token in specials else "a token of the vocabulary"
            raise UserError(f"{where}: already {kind} (id {taken}); remove it")
        if token in tokens[:place]:
            raise UserError(f"{where}: named twice; expected each new token once")
        word = token.isascii() and token[0].isalnum() and token[-1].isalnum()
        flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "special"), False) | {"single_word": word}
        added.append({"id": first + place, "content": token} | flags)
    return added

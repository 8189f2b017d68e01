"""The `tokenizers` library under a Tokenizer, and the layout of llm3's own tokenizers."""

import functools
from collections.abc import Mapping
from typing import Any

import tokenizers

from llm3.data.special_tokens import Specials
from llm3.data.token_texts import BYTES

SPECIALS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|mask|>")  # of llm3's own tokenizers; the id of a token is its index
OWN = Specials(pad=0, bos=1, eos=2, mask=3, ends=(2,))


@functools.lru_cache(maxsize=1)  # a large one takes a second, and is asked for twice
def vocabulary(text: str) -> dict[str, int]:
    """{token: id} of a tokenizer.json, added tokens included. Raises ValueError if it cannot be parsed."""
    return parsed(text).get_vocab(with_added_tokens=True)


def parsed(text: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"cannot be parsed: {error}") from error


def make_backend(text: str, *, spell_specials: bool) -> tokenizers.Tokenizer:
    backend = parsed(text)
    backend.encode_special_tokens = not spell_specials  # "<|eos|>" in a text is plain text
    backend.no_padding()
    backend.no_truncation()
    return backend


def check_own(content: Mapping[str, Any], ids: Mapping[str, int]) -> None:
    """Raise ValueError unless this is a tokenizer that llm3 trained, perhaps with added tokens."""
    found = tuple(sorted(ids, key=ids.__getitem__)[: len(SPECIALS)])
    if found != SPECIALS:
        raise ValueError(f"its tokens 0 to 3 are {found}, not {SPECIALS}")
    if content["decoder"].get("type") != "ByteLevel" or content["normalizer"] is not None:
        raise ValueError("it is not a byte-level tokenizer without a normalizer")
    if lacking := [byte for byte in BYTES if byte not in ids]:
        raise ValueError(f"{len(lacking)} of the 256 bytes have no token")
    for added in content["added_tokens"]:
        if added["lstrip"] or added["rstrip"]:
            raise ValueError(f"its token {added['content']!r} also matches the spaces around it")


def is_foreign(content: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json is not one that llm3 wrote for itself."""
    first = tuple(each.get("content") for each in content.get("added_tokens", ())[: len(SPECIALS)])
    return first != SPECIALS or content.get("post_processor") is not None

"""What the tokens of any tokenizer.json write, and the same tokenizer made so that no text spells a special token."""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

FIRST_MARK = 0x100000  # characters of private use; each stands for a special token in a text that a template wrote
MARKS = re.compile("[\U00100000-\U0010ffff]")
SPACE = "\u2581"  # what SentencePiece writes for a space
# parts of a pre-tokenizer that keep every character
KEEPING = ("Sequence", "ByteLevel", "Split", "Digits", "Punctuation", "UnicodeScripts", "FixedLength")


def _byte_alphabet() -> dict[str, int]:
    """{character: byte} of a byte-level vocabulary (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTES = _byte_alphabet()


def parts(node: Any) -> Iterator[Mapping[str, Any]]:
    """A normalizer, pre-tokenizer or decoder, or those of which a Sequence consists."""
    if isinstance(node, Mapping):
        yield node
        for inner in ("normalizers", "pretokenizers", "decoders"):
            for each in node.get(inner) or ():
                yield from parts(each)


def is_byte_level(content: Mapping[str, Any]) -> bool:
    """Whether the characters of the vocabulary stand for bytes."""
    found = (content.get(name) for name in ("normalizer", "pre_tokenizer"))
    return any(part.get("type") == "ByteLevel" for node in found for part in parts(node))


def is_lossless(content: Mapping[str, Any], vocabulary: Collection[str]) -> bool:
    """Whether each text is exactly the bytes of its tokens: byte-level, and nothing changes or drops a character."""
    splits = list(parts(content.get("pre_tokenizer")))
    return (
        is_byte_level(content)
        and content.get("normalizer") is None
        and content["model"].get("type") == "BPE"
        and not content["model"].get("end_of_word_suffix")
        and all(part.get("type") in KEEPING and part.get("behavior") != "Removed" for part in splits)
        and not any(part.get("type") == "ByteLevel" and part.get("add_prefix_space") for part in splits)
        and not any(
            (each["lstrip"] or each["rstrip"]) and not each["special"] for each in content.get("added_tokens", ())
        )
        and all(byte in vocabulary for byte in BYTES)
    )


def token_bytes(content: Mapping[str, Any], token: str, added: Collection[str]) -> bytes:
    """What a token writes in running text; with the space before it, if it has one. added: the added tokens."""
    model = content["model"]
    if token in added and not is_byte_token(content, token):
        return token.encode()  # stored as plain text, not as byte-level characters
    if is_byte_level(content) and all(character in BYTES for character in token):
        return bytes(BYTES[character] for character in token)
    if is_byte_token(content, token):
        return bytes([int(token[3:5], 16)])
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    if model.get("type") in ("WordPiece", "WordLevel"):
        inside = bool(prefix) and token.startswith(prefix)
        return (token.removeprefix(prefix) if inside else f" {token}").encode()
    if suffix and token.endswith(suffix):
        return (token.removesuffix(suffix) + " ").encode()
    return token.removeprefix(prefix).replace(SPACE, " ").encode()


def unknown_token(content: Mapping[str, Any]) -> str:
    """The token for what the vocabulary lacks; "" if there is none."""
    model = content["model"]
    number = model.get("unk_id")
    return (model.get("unk_token") or "") if number is None else model["vocab"][number][0]


def is_byte_token(content: Mapping[str, Any], token: str) -> bool:
    """Whether a token like <0x41> stands for a byte of a character that the vocabulary lacks."""
    return bool(content["model"].get("byte_fallback")) and len(token) == 6 and token[:3] == "<0x" and token[5] == ">"


def special_tokens(content: Mapping[str, Any], named: Collection[str]) -> list[str]:
    """The tokens that no text may spell: those that the JSON calls special, and those that a file names."""
    added = (each["content"] for each in content.get("added_tokens", ()) if each["special"])
    found = dict.fromkeys([*added, *named])
    return [each for each in found if not is_byte_token(content, each)]


def unspellable(content: Mapping[str, Any], specials: Collection[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The tokenizer in which no text spells a special token, and {token: the mark that stands for it}.

    Special tokens of the model's vocabulary get names that cannot be words, since they are longer than any and hold
    white space: a Unigram, or a BPE with `ignore_merges`, finds every other name in a text. Special tokens that are
    added get marks as names. All other tokens keep their ids.
    """
    marks = {each: chr(FIRST_MARK + number) for number, each in enumerate(specials)}
    model, added = dict(content["model"]), content.get("added_tokens", ())
    known = {piece for piece, _ in model["vocab"]} if isinstance(model["vocab"], list) else model["vocab"]
    longest = max(100, model.get("max_input_chars_per_word") or 0)
    names = {each: f"{marks[each]}{' ' * longest}{marks[each]}" for each in specials if each in known}
    if isinstance(model["vocab"], list):
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {names.get(token, token): number for token, number in model["vocab"].items()}
    unknown = model.get("unk_token")
    model |= {"unk_token": names.get(unknown, unknown)} if unknown else {}
    if names and model.get("merges"):
        model["merges"] = [each for each in model["merges"] if not _makes(each, names)]
    model |= {"dropout": None} if model.get("dropout") else {}
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    marked = {token: {"id": 0, **plain, "content": mark} for token, mark in marks.items()}
    for each in added:
        if each["content"] in marks:
            marked[each["content"]] = each | {"content": marks[each["content"]], "special": True, "normalized": False}
    kept = [each for each in added if each["content"] not in names and not is_byte_token(content, each["content"])]
    first = [marked.get(each["content"], each) for each in kept]
    last = [marked[each] for each in names]  # their marks get new ids
    changed = dict.fromkeys(("post_processor", "truncation", "padding"))
    return {**content, **changed, "model": model, "added_tokens": first + last}, marks


def has_mark(text: str) -> bool:
    """Whether a text has a character that may stand for a special token."""
    return MARKS.search(text) is not None


def _makes(merge: str | list[str], tokens: Collection[str]) -> bool:
    pair = merge.split(" ") if isinstance(merge, str) else merge
    return "".join(pair) in tokens or any(each in tokens for each in pair)


def canonical(content: Any) -> str:
    """A unique spelling of JSON; the tokenizers library writes the vocabulary in a different order each time."""
    return json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))

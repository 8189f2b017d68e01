"""Tokenizers: llm3's own, a lossless byte-level BPE, and any tokenizer.json. No text can spell a special token."""

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from llm3.config.data_schema import MIN_VOCAB_SIZE
from llm3.data import token_texts
from llm3.data.added_tokens import added_tokens
from llm3.data.special_tokens import Specials, find_specials, post_processor_tokens
from llm3.data.token_texts import canonical
from llm3.data.tokenizer_backends import OWN, SPECIALS, check_own, is_foreign, make_backend, vocabulary
from llm3.data.tokenizer_files import KEPT, files_beside, read_object, template_of, tokenizer_file
from llm3.errors import UserError, at_least
from llm3.files import CHAT_TEMPLATE, TOKENIZER, write_atomic

FOREIGN = "llm3"  # the key of a saved tokenizer of others: its special tokens, and the files that came with it

Pieces = list[str | int]  # texts, and special tokens by id


class Spans(NamedTuple):
    """Tokens, and the characters from `starts` to before `ends` that each covers."""

    ids: list[int]
    starts: list[int]
    ends: list[int]


class Tokenizer:
    """Text to token ids and back. Special tokens come from code and templates only, never from text.

    pad_id, eos_id: int. bos_id, mask_id: int, or None if there is no such token. end_ids: all tokens that end a text or
    a turn, eos first. foreign: whether it is not one of llm3's own. lossless: whether any text is exactly the bytes of
    its tokens. specials: {special token: id}. chat_template: the template that came with it; "": none.

    Safe to call from several threads at once.
    """

    def __init__(self, saved: str):
        """Read the JSON of one of llm3's own tokenizers, or of `save`. Raises ValueError if it is neither."""
        content = json.loads(saved)
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
        said = content.pop(FOREIGN, None)
        self._content, self._said, self.foreign = content, said, said is not None
        self._json = canonical(content)
        self._added = {each["content"] for each in content.get("added_tokens", ())}
        ids, marks = vocabulary(self._json), dict[str, str]()
        if said is None:
            check_own(content, ids)
            named, backend = OWN, self._json
            self.specials = {text: i for i, text in enumerate(SPECIALS)}
        else:
            named = Specials(**said["special"] | {"ends": tuple(said["special"]["ends"])})
            texts = {number: text for text, number in ids.items()}
            known = {texts[i] for i in (*named[:4], *named.ends) if i is not None}
            self.specials = {each: ids[each] for each in token_texts.special_tokens(content, sorted(known))}
            changed, marks = token_texts.unspellable(content, list(self.specials))
            backend = canonical(changed)
        self.pad_id, self.bos_id, self.eos_id, self.mask_id, self.end_ids = named
        self._marks = {self.specials[text]: mark for text, mark in marks.items()}
        self._marked_json, self._ids = backend, ids
        self._backend = make_backend(backend, spell_specials=False)
        self.lossless = said is None or token_texts.is_lossless(content, ids)
        self.chat_template = template_of(said["files"]) if said else ""
        self.vocab_size = max(ids.values()) + 1

    @property
    def starts(self) -> list[int]:
        """The special tokens at the start of a document: bos, if there is one."""
        return [] if self.bos_id is None else [self.bos_id]

    @property
    def prefix_id(self) -> int:
        """The token before a text that has none before it: bos, else eos."""
        return self.eos_id if self.bos_id is None else self.bos_id

    @property
    def adds_bos(self) -> bool:
        """Whether a text alone gets bos before it: always by llm3's own tokenizers, else by the post-processor."""
        first = post_processor_tokens(self._content.get("post_processor"))[:1]
        return not self.foreign or (self.bos_id is not None and first == (self.tokens[self.bos_id],))

    @functools.cached_property
    def hash(self) -> str:
        """The sha256 of the canonical JSON and of the special tokens; the same on any machine."""
        special = {FOREIGN: self._said["special"]} if self._said else {}
        return hashlib.sha256(canonical(self._content | special).encode()).hexdigest()

    @functools.cached_property
    def tokens(self) -> list[str]:
        """The name of each token; "" for an id without a token."""
        names = [""] * self.vocab_size
        for text, number in self._ids.items():
            names[number] = text
        return names

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        """The UTF-8 bytes that each token writes in running text; empty for special tokens.

        They are exactly those of the text if the tokenizer is lossless.
        """
        written = [b""] * self.vocab_size
        for token, number in self._ids.items():
            written[number] = (
                b"" if token in self.specials else token_texts.token_bytes(self._content, token, self._added)
            )
        return written

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        """The number of bytes in `token_bytes`: int32 [vocab_size], 0 for special tokens."""
        return np.array([len(token) for token in self.token_bytes], np.int32)

    @functools.cached_property
    def is_text(self) -> np.ndarray:
        """bool [vocab_size], True for tokens that stand for text: all but special tokens, and the unknown token."""
        known = self.byte_lengths > 0
        if (unknown := token_texts.unknown_token(self._content)) in self._ids:
            known[self._ids[unknown]] = True
        return known

    def need_mask(self) -> int:
        """The mask token. Raises UserError if there is none."""
        if self.mask_id is None:
            raise UserError(
                "tokenizer.special.mask: the tokenizer has no mask token, which hides text: expected one of its tokens "
                "that no text needs, as in tokenizer.special=dict(mask=...)"
            )
        return self.mask_id

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without special tokens."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, computed by all threads of the tokenizers library."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_spans(self, pieces: Pieces, *, joint: bool = False) -> Spans:
        """The tokens of pieces, with their characters in the joined pieces; a special token counts as one character.

        joint: with a tokenizer of others, encode all pieces as one text, as transformers encodes what a template wrote.
        """
        marks = self._marks
        texts = [piece for piece in pieces if isinstance(piece, str)]
        if joint and self.foreign and not any(token_texts.has_mark(text) for text in texts):
            text = "".join(marks[piece] if isinstance(piece, int) else piece for piece in pieces)
            found = self._template_backend.encode(text, add_special_tokens=False)
            ids = [self._unmarked.get(number, number) for number in found.ids]
            return Spans(ids, [start for start, _ in found.offsets], [end for _, end in found.offsets])
        result, at = Spans([], [], []), 0
        for piece in pieces:
            if isinstance(piece, int):
                ids, offsets, size = [piece], [(0, 1)], 1
            else:
                found = self._backend.encode(piece, add_special_tokens=False)
                ids, offsets, size = found.ids, found.offsets, len(piece)
            result.ids.extend(ids)
            result.starts.extend(at + start for start, _ in offsets)
            result.ends.extend(at + end for _, end in offsets)
            at += size
        return result

    @functools.cached_property
    def _template_backend(self) -> tokenizers.Tokenizer:
        """Reads marks as special tokens."""
        return make_backend(self._marked_json, spell_specials=True)

    @functools.cached_property
    def _unmarked(self) -> dict[int, int]:
        """{id of a mark in the backend: id of its special token}"""
        found = {self._template_backend.token_to_id(mark): number for number, mark in self._marks.items()}
        return {marked: number for marked, number in found.items() if marked is not None}

    def first_bytes(self, text: str, ids: Sequence[int]) -> int:
        """The bytes of the text that its first token covers, given its tokens."""
        if not ids:
            return 0
        token = self.token_bytes[ids[0]]
        if token and text[: len(token)].encode().startswith(token):
            return len(token)
        return len(text[: self._backend.encode(text, add_special_tokens=False).offsets[0][1]].encode())

    def decode(self, ids: Iterable[int]) -> str:
        """The text of tokens, without special tokens; bytes that are not UTF-8 become U+FFFD."""
        numbers = [int(i) for i in ids]
        if not self.foreign or token_texts.is_byte_level(self._content):
            return b"".join(self.token_bytes[i] for i in numbers).decode("utf-8", errors="replace")
        return self._backend.decode([i for i in numbers if self.token_bytes[i]], skip_special_tokens=False)

    def continuation(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """The text that tokens add after others; many decoders drop a space at the start of a text."""
        text, whole = self.decode(before), self.decode([*before, *ids])
        return whole[len(text) :] if self.foreign and whole.startswith(text) else self.decode(ids)

    def extended(self, tokens: Sequence[str]) -> "Tokenizer":
        """This tokenizer with new tokens, appended in the given order. They match before all tokens of the vocabulary.

        An ASCII token that begins and ends with a letter or digit matches whole words only. Any other token matches
        anywhere (not every script has spaces). The longest match wins. Raises UserError for a token that is empty,
        named twice, or already in the vocabulary.
        """
        known = {text: i for i, text in enumerate(self.token_bytes) if text}
        added = added_tokens(tokens, known, self._ids, self.specials, self.vocab_size)
        return self._with_added([*self._content["added_tokens"], *added])

    def without(self, tokens: Sequence[str]) -> "Tokenizer":
        """This tokenizer without its last tokens, which must be `tokens`. Raises UserError if they are not the last."""
        added = self._content["added_tokens"]
        kept = max(0, len(added) - len(tokens))
        last = [each["content"] for each in added[kept:] if not each["special"]]
        if last != list(tokens):
            raise UserError(f"tokenizer.add={list(tokens)}: the last tokens of the vocabulary are {last}")
        return self._with_added(added[:kept])

    def _with_added(self, added: list[dict[str, Any]]) -> "Tokenizer":
        said = {FOREIGN: self._said} if self._said else {}
        return Tokenizer(canonical(self._content | {"added_tokens": added} | said))

    def files(self) -> dict[str, str]:
        """{name: text} of the files of a foreign tokenizer as they came, with added tokens; {} for llm3's own."""
        if not self._said:
            return {}
        return {TOKENIZER: json.dumps(self._content, ensure_ascii=False, indent=2)} | {
            name: text for name, text in self._said["files"].items() if name in (*KEPT, CHAT_TEMPLATE)
        }

    def save(self, path: Path | str) -> None:
        """Write the tokenizer, with all that is known of its special tokens, to a JSON file, complete or not at all."""
        said = {FOREIGN: self._said} if self._said else {}
        write_atomic(Path(path), canonical(self._content | said) if said else self._json)

    @classmethod
    def load(cls, path: Path | str, special: Mapping[str, Any] | None = None) -> "Tokenizer":
        """Read a file of `save`, a tokenizer.json with the files beside it, or a folder that holds them.

        special: tokens by name, as `tokenizer.special`. Raises UserError if it is missing, damaged or of another
        format, or if nothing names the token that ends a text.
        """
        file = tokenizer_file(Path(path))
        try:
            text = file.read_text(encoding="utf-8")
            content = json.loads(text)
            if isinstance(content, dict) and FOREIGN not in content and is_foreign(content):
                return cls.of_files(text, files_beside(file), special or {}, f"tokenizer {file}")
            if special:
                raise UserError(f"tokenizer.special={dict(special)}: {file} names its special tokens itself; remove it")
            return cls(text)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:  # bad JSON, or of another layout
            raise UserError(f"tokenizer: {file} cannot be read as a tokenizer.json: {error}") from error

    @classmethod
    def of_files(cls, text: str, files: dict[str, str], special: Mapping[str, Any], where: str) -> "Tokenizer":
        """A tokenizer of others. text: its tokenizer.json. files: {name: text} of the files beside it.

        Raises ValueError for damaged JSON, and UserError as `load`.
        """
        content = json.loads(text)
        objects = {
            name: read_object(each, f"{where}: {name}") for name, each in files.items() if name.endswith(".json")
        }
        found = find_specials(objects, content, vocabulary(text), special, where)
        said = {"special": found._asdict(), "files": {name: each for name, each in files.items() if name in KEPT}}
        return cls(canonical(content | {FOREIGN: said}))


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE. The same texts in the same order give the same tokenizer, hash included.

    The vocabulary stays smaller than vocab_size if the texts have too few merges. Words are split as in GPT-2 (Radford
    et al. 2019, section 2.2). Raises UserError if vocab_size is below 260 (4 special tokens and 256 bytes).
    """
    at_least("tokenizer.vocab_size", vocab_size, MIN_VOCAB_SIZE)
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(iter(texts), trainer)
    return Tokenizer(backend.to_str())

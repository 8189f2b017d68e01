"""A lossless byte-level BPE tokenizer. No text can spell its special tokens."""

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from llm3.config.data_schema import TokenizerConfig
from llm3.errors import UserError
from llm3.files import local_path, write_atomic

SPECIALS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|mask|>")  # the id of a token is its index
MIN_VOCAB_SIZE = len(SPECIALS) + 256


def _byte_alphabet() -> dict[str, int]:
    """{character: byte} of a byte-level vocabulary (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTES = _byte_alphabet()


class Tokenizer:
    """Text to token ids and back without loss. Special tokens come from code only, never from text.

    Safe to call from several threads at once.
    """

    pad_id, bos_id, eos_id, mask_id = range(len(SPECIALS))

    def __init__(self, canonical_json: str):
        """Read the JSON of the `tokenizers` library. Raises ValueError if it is not a byte-level tokenizer of llm3."""
        self._json = canonical_json
        try:
            self._backend = tokenizers.Tokenizer.from_str(canonical_json)
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"cannot be parsed: {error}") from error
        self._check_layout()
        self._backend.encode_special_tokens = True  # "<|eos|>" in a text is plain text
        self._backend.no_padding()
        self._backend.no_truncation()

    def _check_layout(self) -> None:
        found = tuple(self._backend.id_to_token(i) for i in range(len(SPECIALS)))
        if found != SPECIALS:
            raise ValueError(f"its tokens 0 to 3 are {found}, not {SPECIALS}")
        if not isinstance(self._backend.decoder, decoders.ByteLevel) or self._backend.normalizer is not None:
            raise ValueError("it is not a byte-level tokenizer without a normalizer")
        lacking = [byte for byte in pre_tokenizers.ByteLevel.alphabet() if self._backend.token_to_id(byte) is None]
        if lacking:
            raise ValueError(f"{len(lacking)} of the 256 bytes have no token")
        for added in self._backend.get_added_tokens_decoder().values():
            if added.lstrip or added.rstrip:
                raise ValueError(f"its token {added.content!r} also matches the spaces around it")

    @property
    def vocab_size(self) -> int:
        return self._backend.get_vocab_size()

    @functools.cached_property
    def hash(self) -> str:
        """The sha256 of the canonical JSON, which is the same on any machine."""
        return hashlib.sha256(self._json.encode()).hexdigest()

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        """The number of UTF-8 bytes of each token: int32 [vocab_size], 0 for special tokens."""
        return np.array([len(token) for token in self.token_bytes], np.int32)

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        """The UTF-8 bytes of each token; empty for special tokens."""
        added = self._backend.get_added_tokens_decoder()
        tokens = []
        for i in range(self.vocab_size):
            if i in added:  # stored as plain text; the library's decoder would read "naïve" as byte-level characters
                tokens.append(b"" if added[i].special else added[i].content.encode())
            else:
                token = self._backend.id_to_token(i)
                assert token is not None, f"the vocabulary has no token {i}"
                tokens.append(bytes(BYTES[character] for character in token))
        return tokens

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without special tokens."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, computed by all threads of the tokenizers library."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of tokens, without special tokens; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes[int(i)] for i in ids).decode("utf-8", errors="replace")

    def extended(self, tokens: Sequence[str]) -> "Tokenizer":
        """This tokenizer with new tokens, appended in the given order. They match before all tokens of the vocabulary.

        An ASCII token that begins and ends with a letter or digit matches whole words only. Any other token matches
        anywhere (not every script has spaces). The longest match wins. Raises UserError for a token that is empty,
        named twice, or already in the vocabulary.
        """
        known = {text: i for i, text in enumerate(self.token_bytes) if text}
        added: dict[str, AddedToken] = {}
        for place, token in enumerate(tokens):
            where = f"tokenizer.add[{place}]={token!r}"
            if not token:
                raise UserError(f"{where}: expected at least one character")
            try:
                taken = known.get(token.encode(), self._backend.token_to_id(token))
            except UnicodeEncodeError:
                raise UserError(f"{where}: not a valid Unicode text") from None
            if taken is not None:
                kind = "a special token" if taken < len(SPECIALS) else "a token of the vocabulary"
                raise UserError(f"{where}: already {kind} (id {taken}); remove it")
            if token in added:
                raise UserError(f"{where}: named twice; expected each new token once")
            word = token.isascii() and token[0].isalnum() and token[-1].isalnum()
            added[token] = AddedToken(token, single_word=word, normalized=False, special=False)
        backend = tokenizers.Tokenizer.from_str(self._json)
        backend.add_tokens(list(added.values()))
        return Tokenizer(_canonical(backend.to_str()))

    def without(self, tokens: Sequence[str]) -> "Tokenizer":
        """This tokenizer without its last tokens, which must be `tokens`. Raises UserError if they are not the last."""
        content = json.loads(self._json)
        kept = max(0, len(content["added_tokens"]) - len(tokens))
        last = [each["content"] for each in content["added_tokens"][kept:] if not each["special"]]
        if last != list(tokens):
            raise UserError(f"tokenizer.add={list(tokens)}: the last tokens of the vocabulary are {last}")
        content["added_tokens"] = content["added_tokens"][:kept]
        return Tokenizer(_canonical(json.dumps(content)))

    def save(self, path: Path | str) -> None:
        """Write the tokenizer to a JSON file, complete or not at all."""
        write_atomic(Path(path), self._json)

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """Read a file of `save`. Raises UserError if it is missing, damaged or another kind of tokenizer."""
        try:
            return cls(_canonical(Path(path).read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise UserError(f"tokenizer: {path} does not exist") from None
        except (OSError, ValueError) as error:  # bad JSON and bad UTF-8 are ValueErrors
            raise UserError(f"tokenizer: {path} is not a tokenizer that llm3 wrote: {error}") from error


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE. The same texts in the same order give the same tokenizer, hash included.

    The vocabulary stays smaller than vocab_size if the texts have too few merges. Words are split as in GPT-2 (Radford
    et al. 2019, section 2.2). Raises UserError if vocab_size is below 260 (4 special tokens and 256 bytes).
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(
            f"tokenizer.vocab_size={vocab_size}: expected at least {MIN_VOCAB_SIZE} (256 bytes, 4 specials)"
        )
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
    return Tokenizer(_canonical(backend.to_str()))


def planned_size(config: TokenizerConfig) -> int:
    """The size of a run's vocabulary as far as the config tells: that of the file at `path`, if it exists already."""
    if not config.path or not (path := local_path(config.path, "config.tokenizer.path")).is_file():
        return config.vocab_size + len(config.add)
    return _size_of(path, path.stat().st_mtime_ns) + len(config.add)


@functools.lru_cache
def _size_of(path: Path, modified: int) -> int:
    return Tokenizer.load(path).vocab_size


def _canonical(text: str) -> str:
    """A unique spelling of a tokenizer; the library writes the vocabulary in a different order each time."""
    return json.dumps(json.loads(text), sort_keys=True, ensure_ascii=False, separators=(",", ":"))

"""Word boundaries of tokenized text, in any script.

- White space begins a word; a single space belongs to the word after it.
- Letters and digits continue the word before them.
- Punctuation, symbols and emoji are words of their own; so is each character of a script without spaces (Chinese,
  Japanese kana, Thai, Lao, Tibetan, Burmese, Khmer).
- Combining marks, and characters after a zero-width joiner, belong to the character before them.
- A token belongs to the word of its first byte, so a character of several tokens is never cut.
"""

import functools
import unicodedata

import numpy as np

from llm3.data.tokenizer import Tokenizer

UNSPACED = (  # first and last code points of blocks of scripts without spaces between words (Unicode 15)
    (0x0E00, 0x0FFF),  # Thai, Lao, Tibetan
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x2E80, 0xA4CF),  # CJK radicals and symbols, kana, Bopomofo, CJK ideographs, Yi
    (0xA9E0, 0xA9FF),  # Myanmar Extended-B
    (0xAA60, 0xAA7F),  # Myanmar Extended-A
    (0xF900, 0xFAFF),  # CJK compatibility ideographs
    (0xFF66, 0xFF9D),  # halfwidth katakana
)
JOINER = 0x200D
SKIN_TONES = (0x1F3FB, 0x1F3FF)
IDEOGRAPHS = 0x20000  # all higher code points are ideographs (or tags)
MARK, LETTER, ALONE, SPACE = range(4)  # kinds of characters; ALONE: a word of its own


def word_numbers(tokens: np.ndarray, segments: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """The index of each token's word, from 0: int64 [n].

    tokens, segments: int [n]. A special token is a word of its own; no word crosses a border of segments.
    """
    contents = tokenizer.token_bytes
    content = b"".join([contents[token] for token in tokens.tolist()])
    lengths = tokenizer.byte_lengths[tokens]
    first = np.cumsum(lengths) - lengths  # first byte of each token
    begins = np.append(_word_starts(content), True)[first] | (lengths == 0)
    begins[1:] |= (lengths[:-1] == 0) | (segments[1:] != segments[:-1])
    begins[:1] = True
    return np.cumsum(begins) - 1


def _word_starts(content: bytes) -> np.ndarray:
    """bool [bytes], True where a word begins. content: UTF-8, perhaps cut inside a character at its ends."""
    starts = np.zeros(len(content), bool)
    data = np.frombuffer(content + bytes(3), np.uint8).astype(np.int32)
    at = np.flatnonzero((data[:-3] & 0xC0) != 0x80)  # the first bytes of characters
    if not len(at):
        return starts
    lead, second, third, fourth = data[at], *(data[at + i] & 0x3F for i in (1, 2, 3))
    codes = np.select(
        [lead < 0x80, lead < 0xE0, lead < 0xF0],
        [lead, (lead & 0x1F) << 6 | second, (lead & 0x0F) << 12 | second << 6 | third],
        (lead & 0x07) << 18 | second << 12 | third << 6 | fourth,
    )
    kinds, space = _kinds()[np.minimum(codes, IDEOGRAPHS)], codes == ord(" ")
    base = np.maximum.accumulate(np.where(kinds == MARK, 0, np.arange(len(at))))  # the character a mark belongs to
    ended = ((kinds >= ALONE) & ~space)[base]
    begins = (kinds == SPACE) | (kinds == ALONE)
    begins[1:] &= (kinds[1:] == SPACE) | ~space[:-1]
    begins[1:] |= (kinds[1:] == LETTER) & ended[:-1]
    begins[1:] &= codes[:-1] != JOINER
    starts[at] = begins
    return starts


@functools.cache
def _kinds() -> np.ndarray:
    """The kind of each code point up to `IDEOGRAPHS`: int8 [code points]."""
    by_category = {"L": LETTER, "N": LETTER, "M": MARK, "space": SPACE}
    characters = map(chr, range(IDEOGRAPHS + 1))
    categories = ("space" if each.isspace() else unicodedata.category(each)[0] for each in characters)
    kinds = np.fromiter((by_category.get(each, ALONE) for each in categories), np.int8)
    for first, last in (*UNSPACED, (IDEOGRAPHS, IDEOGRAPHS)):
        block = kinds[first : last + 1]
        block[block == LETTER] = ALONE
    kinds[JOINER] = kinds[SKIN_TONES[0] : SKIN_TONES[1] + 1] = MARK
    return kinds

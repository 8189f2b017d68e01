"""Where the words of a text begin, token by token, in any script.

White space begins a word, and a single space belongs to the word after it. Letters and digits go on with the word that
they follow. Punctuation, symbols and emoji are words of their own, and so is each character of a script that is written
without spaces (Chinese, Japanese kana, Thai, Lao, Tibetan, Burmese, Khmer). Combining marks, and what a zero-width
joiner joins, belong to what they follow. A token belongs to the word of its first byte, so no character is cut, however
many tokens it has.
"""

import functools
import unicodedata

import numpy as np

from llm3.data.tokenizer import Tokenizer

UNSPACED = (  # first and last code points of the blocks whose scripts put no spaces between words (Unicode 15)
    (0x0E00, 0x0FFF),  # Thai, Lao, Tibetan
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x2E80, 0xA4CF),  # CJK radicals and symbols, kana, Bopomofo, CJK ideographs, Yi
    (0xA9E0, 0xA9FF),  # Myanmar, extended
    (0xAA60, 0xAA7F),  # the same
    (0xF900, 0xFAFF),  # CJK compatibility ideographs
    (0xFF66, 0xFF9D),  # halfwidth katakana
)
JOINER = 0x200D
SKIN_TONES = (0x1F3FB, 0x1F3FF)
IDEOGRAPHS = 0x20000  # from here on there are ideographs only (and tags)
MARK, LETTER, ALONE, SPACE = range(4)  # a mark; a letter or digit; a word of its own; white space


def word_numbers(tokens: np.ndarray, segments: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """The word that each token belongs to: int64 [n], from 0 upwards. No word has tokens of two segments.

    tokens, segments: int [n]. A special token is a word of its own.
    """
    contents = tokenizer.token_bytes
    content = b"".join([contents[token] for token in tokens.tolist()])
    lengths = tokenizer.byte_lengths[tokens]
    first = np.cumsum(lengths) - lengths  # byte of each token
    begins = np.append(_word_starts(content), True)[first] | (lengths == 0)
    begins[1:] |= (lengths[:-1] == 0) | (segments[1:] != segments[:-1])
    begins[:1] = True
    return np.cumsum(begins) - 1


def _word_starts(content: bytes) -> np.ndarray:
    """At which bytes of a text, UTF-8 that may be cut at its ends, a word begins: bool [bytes]."""
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
    base = np.maximum.accumulate(np.where(kinds == MARK, 0, np.arange(len(at))))  # of each character and its marks
    ended = ((kinds >= ALONE) & ~space)[base]
    begins = (kinds == SPACE) | (kinds == ALONE)
    begins[1:] &= (kinds[1:] == SPACE) | ~space[:-1]
    begins[1:] |= (kinds[1:] == LETTER) & ended[:-1]
    begins[1:] &= codes[:-1] != JOINER
    starts[at] = begins
    return starts


@functools.cache
def _kinds() -> np.ndarray:
    """What each code point up to `IDEOGRAPHS` is: int8 [code points]."""
    by_category = {"L": LETTER, "N": LETTER, "M": MARK}
    kinds = [
        SPACE if each.isspace() else by_category.get(unicodedata.category(each)[0], ALONE)
        for each in map(chr, range(IDEOGRAPHS + 1))
    ]
    kinds = np.array(kinds, np.int8)
    for first, last in (*UNSPACED, (IDEOGRAPHS, IDEOGRAPHS)):
        block = kinds[first : last + 1]
        block[block == LETTER] = ALONE
    kinds[JOINER] = kinds[SKIN_TONES[0] : SKIN_TONES[1] + 1] = MARK
    return kinds

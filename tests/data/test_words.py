"""Word boundaries in any script, from tokens that may hold only part of a character."""

import numpy as np
import pytest

from llm3.data import tokenizer as tokenizers
from llm3.data.words import word_numbers

TEXT = "the cat sat on the mat; naïve cafés 这是中文 한국어 문장입니다 👍 " * 20
TOKENIZERS = {"bytes": tokenizers.train([], 260), "merges": tokenizers.train([TEXT], 330)}
both_tokenizers = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)


def words_of(text: str, tokenizer) -> list[str]:
    tokens = np.array(tokenizer.encode(text))
    words = word_numbers(tokens, np.ones_like(tokens), tokenizer)
    return [tokenizer.decode(tokens[words == word]) for word in range(words.max() + 1)]


@both_tokenizers
@pytest.mark.parametrize(
    "words",
    [
        ["the", " cat", ",", " naïve", " cafés", ".", " x1", "_", "y"],
        ["don", "'", "t", " (", "really", ")"],
        ["two", " ", " spaces", "\n", "\n", "lines"],
        ["这", "是", " 中", "文", "。", "カ", "タ", "カ", "ナ", "abc", "字"],
        [" 한국어", " 문장입니다"],
        [" Привет", " мир", " नमस्ते", " thế", " giới"],
        ["ส", "วั", "ส", "ดี"],
        ["ok", "👍🏽", "❤️", "done", "👨‍👩‍👧", "!"],
        ["e\u0301te\u0301", " x\u0301y"],
    ],
    ids=lambda words: words[0].strip(),
)
def test_words_depend_on_the_text_and_not_on_its_tokens(words, tokenizer):
    assert words_of("".join(words), tokenizer) == words


def test_a_special_token_and_a_new_document_begin_a_word():
    tokenizer = TOKENIZERS["bytes"]
    cat = tokenizer.encode("cat")
    tokens = np.array([*cat, tokenizer.eos_id, tokenizer.bos_id, *cat, *cat])
    segments = np.repeat([1, 2, 3], [4, 4, 3])
    assert word_numbers(tokens, segments, tokenizer).tolist() == [0, 0, 0, 1, 2, 3, 3, 3, 4, 4, 4]


def test_part_of_a_character_at_the_start_or_end_of_a_window_is_one_word():
    tokenizer = TOKENIZERS["bytes"]
    tokens = np.array(tokenizer.encode("中文字"))[1:-1]
    assert word_numbers(tokens, np.ones_like(tokens), tokenizer).tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert word_numbers(tokens[:0], tokens[:0], tokenizer).tolist() == []

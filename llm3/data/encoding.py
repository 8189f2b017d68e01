"""Tokens of pieces: texts, and special tokens by id, as chat templates and row formats write them."""

import itertools
from collections.abc import Sequence

import numpy as np

from llm3.data.tokenizer import Pieces, Tokenizer


def merge_texts(pieces: Pieces) -> Pieces:
    """The pieces with adjacent texts merged, so that they are encoded together."""
    groups = itertools.groupby(pieces, key=lambda piece: isinstance(piece, str))
    return [each for texts, group in groups for each in (["".join(map(str, group))] if texts else group)]


def encode_pieces(pieces: Pieces, tokenizer: Tokenizer, *, joint: bool = False) -> list[int]:
    """The tokens of pieces, end to end. joint: see `Tokenizer.encode_spans`; for what a template wrote."""
    if joint and tokenizer.foreign:
        return tokenizer.encode_spans(pieces, joint=True).ids
    texts = iter(tokenizer.encode_batch([piece for piece in pieces if isinstance(piece, str)]))
    return list(itertools.chain.from_iterable([each] if isinstance(each, int) else next(texts) for each in pieces))


def encode_runs(
    runs: Sequence[tuple[Pieces, bool]], tokenizer: Tokenizer, *, joint: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Runs of (pieces, whether they are an answer), end to end: tokens int32 [n], answer mask bool [n].

    Each run is encoded alone, since a prompt is encoded alone at inference. What a template wrote (joint) is encoded as
    one text with a tokenizer of others; a token with a character of an answer then belongs to it, as in transformers.
    """
    if not (joint and tokenizer.foreign):
        return concatenate_runs([(encode_pieces(pieces, tokenizer), labelled) for pieces, labelled in runs])
    flat = [piece for pieces, _ in runs for piece in pieces]
    sizes = [sum(len(piece) if isinstance(piece, str) else 1 for piece in pieces) for pieces, _ in runs]
    found = tokenizer.encode_spans(flat, joint=True)
    before = np.concatenate([[0], np.cumsum(np.repeat([labelled for _, labelled in runs], sizes))])
    starts = np.array(found.starts, np.int64)
    ends = np.minimum(np.maximum(found.ends, starts + 1), len(before) - 1)
    return np.array(found.ids, np.int32), before[ends] > before[starts]


def concatenate_runs(runs: Sequence[tuple[list[int], bool]]) -> tuple[np.ndarray, np.ndarray]:
    """Runs of (tokens, whether they are an answer), end to end: tokens int32 [n], answer mask bool [n]."""
    tokens = np.concatenate([np.array(run, np.int32) for run, _ in runs])
    return tokens, np.repeat([labelled for _, labelled in runs], [len(run) for run, _ in runs])

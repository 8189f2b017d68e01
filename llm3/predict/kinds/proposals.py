"""The likeliest tokens in place of each mask token of a text, by a bidirectional model."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa

from llm3.data.batch import Batch
from llm3.data.formats import BadRow, Document
from llm3.data.tokenizer import Pieces, Tokenizer
from llm3.errors import at_least
from llm3.models.layers import at_positions
from llm3.models.transformer import Transformer
from llm3.predict.fields import Fields
from llm3.predict.session import Item, Session, pieces, shortest, size_class
from llm3.predict.trained import Trained

FORMATS = ("text",)
ROWS = 1024


@dataclasses.dataclass(frozen=True)
class Options:
    """top_k: proposals for each mask token. mask: how texts write the mask token; "": by its name."""

    top_k: int = 5
    mask: str = ""

    def __post_init__(self) -> None:
        at_least("top_k", self.top_k, 1)


def least_length(options: Options) -> int:
    """A start, a mask token and an end."""
    return 3


def refusal(trained: Trained) -> str:
    """Only a bidirectional model with an LM head reads both sides of a mask token."""
    if trained.model.causal:
        return "it is a causal model"
    if trained.tokenizer.mask_id is None:
        return "its tokenizer has no mask token"
    return "" if trained.lm_head else "its LM head is untrained"


def read(row: dict[str, Any], fields: Fields) -> dict[str, Any]:
    """The text or the pair of texts. Raises BadRow."""
    return fields.plugin.read_input(row, fields.source)


def encode(record: dict[str, Any], fields: Fields, trained: Trained, tokenizer: Any, options: Options) -> Document:
    """[bos] text [eos], or [bos] text [eos] pair [eos], with mask tokens. Raises BadRow if there is none."""
    own, tokens = trained.tokenizer, list(trained.tokenizer.starts)
    mask = own.need_mask()
    for text in fields.plugin.texts(record):
        written = masked_pieces(text, options.mask or own.tokens[mask], own)
        tokens += [*own.encode_spans(written, joint=True).ids, own.eos_id]
    if mask not in tokens:
        raise BadRow(f"no mask token {options.mask or own.tokens[mask]!r}")
    return Document(np.array(tokens, np.int32), None, 0)


def masked_pieces(text: str, name: str, tokenizer: Tokenizer) -> Pieces:
    """The text, with the mask token wherever it has the name.

    With llm3's own tokenizers, whose words begin with a space, a mask token stands for the space before it too.
    """
    parts = text.split(name)
    if not tokenizer.foreign:
        parts[:-1] = [part.removesuffix(" ") for part in parts[:-1]]
    result: Pieces = []
    for part in parts:
        result += [part, tokenizer.need_mask()] if part else [tokenizer.need_mask()]
    last = result.pop()
    assert last == tokenizer.need_mask()
    return result


def columns(trained: Trained, options: Options) -> dict[str, pa.DataType]:
    """proposals: for each mask token, the likeliest tokens, {token, probability}, the likeliest first."""
    proposal = pa.struct([("token", pa.string()), ("probability", pa.float32())])
    return {"proposals": pa.list_(pa.list_(proposal))}


def likeliest(model: Transformer, batch: Batch, *, mask: int, most: int, top_k: int) -> dict[str, jax.Array]:
    """The `top_k` likeliest tokens at the first `most` mask tokens of each window: tokens, probabilities [B, most, K].

    positions: [B, most], those of the mask tokens in their order; -1 if there are fewer.
    """
    hidden = model(batch.tokens, batch.positions, batch.segments)
    masked = (batch.tokens == mask) & (batch.segments > 0)
    real, positions = jax.lax.top_k(masked.astype(jnp.float32), most)
    shares, tokens = jax.lax.top_k(jax.nn.softmax(model.logits(at_positions(hidden, positions, 1))), top_k)
    return {"tokens": tokens, "probabilities": shares, "positions": jnp.where(real > 0, positions, -1)}


def predict(session: Session, items: Sequence[Item]) -> list[dict[str, Any] | BadRow]:
    """The proposals for each row; BadRow for a row that is longer than the window."""
    long = BadRow(f"longer than the window of {session.length:,} tokens")
    found: list[dict[str, Any] | BadRow] = [long] * len(items)
    fitting = [number for number, each in enumerate(items) if len(each.document.tokens) <= session.length]
    context, tokenizer = session.context([items[number] for number in fitting], "examples"), session.tokenizer
    mask, table = tokenizer.need_mask(), context.table()
    masks = [int((items[number].document.tokens == mask).sum()) for number in fitting]
    most = max((sum(masks[each] for _, each, _ in table.documents_of(i)) for i in range(len(table))), default=1)
    run = functools.partial(
        likeliest,
        mask=mask,
        most=min(session.length, size_class(most)),
        top_k=min(session.options.top_k, session.model.vocab_size),
    )
    for piece in pieces(context, run, table):
        inside = np.flatnonzero(np.isin(piece.result["positions"], piece.place))
        tokens, shares = piece.result["tokens"][inside], piece.result["probabilities"][inside]
        each = [proposals(*both, tokenizer) for both in zip(tokens, shares, strict=True)]
        found[fitting[piece.document]] = {"proposals": each}
    return found


def proposals(tokens: np.ndarray, probabilities: np.ndarray, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """{token, probability} of each proposal; a special token by its name."""
    texts = [tokenizer.decode([token]) or tokenizer.tokens[token] for token in tokens.tolist()]
    return [{"token": text, "probability": shortest(share)} for text, share in zip(texts, probabilities, strict=True)]

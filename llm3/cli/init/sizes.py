"""Sizes that suit some data: the model and its vocabulary by the bytes of text, the steps by their number of epochs."""

import math
from typing import Any, NamedTuple

BYTES_PER_TOKEN = 3.0  # of a small vocabulary


class Sizes(NamedTuple):
    """A model, and how it is trained. most_steps: so many that a CPU takes a minute or two, an accelerator hours."""

    model: dict[str, Any]
    vocab_size: int
    batch_size: int
    sequence_length: int
    most_steps: int


def model(layers: int, d_model: int, heads: int, d_ff: int) -> dict[str, Any]:
    """The fields of a model."""
    return {"layers": layers, "d_model": d_model, "heads": heads, "d_ff": d_ff}


TINY = Sizes(model(2, 64, 4, 176), 1024, 8, 128, 600)
SMALL = Sizes(model(4, 128, 4, 352), 4096, 8, 256, 300)
# {bytes of text up to which it suits: sizes}
ON_CPU = {500e3: TINY, math.inf: SMALL}
ON_ACCELERATOR = {
    500e3: TINY,
    5e6: SMALL,
    500e6: Sizes(model(8, 512, 8, 1408), 16_384, 32, 512, 5000),
    math.inf: Sizes(model(12, 768, 12, 2048), 32_768, 64, 1024, 20_000),
}


def sizes_for(text_bytes: float, accelerator: bool) -> Sizes:
    """The sizes for so much text to pretrain on."""
    return next(each for most, each in (ON_ACCELERATOR if accelerator else ON_CPU).items() if text_bytes <= most)


def steps_for(text_bytes: float, epochs: float, step_tokens: int, most: int) -> int:
    """The steps that make so many epochs, a multiple of 10 from 60 up to `most`."""
    steps = epochs * text_bytes / BYTES_PER_TOKEN / step_tokens
    return min(max(60, math.ceil(steps / 10) * 10), most)


def window_for(lengths: list[int], longest: int) -> int:
    """Tokens that hold all but a twentieth of the documents, a multiple of 64 up to `longest`. lengths: in bytes."""
    usual = sorted(lengths)[int(0.95 * (len(lengths) - 1))]
    return min(max(64, math.ceil((usual / BYTES_PER_TOKEN + 4) / 64) * 64), longest)


def share_for(rows: int) -> float:
    """The share of the rows to hold out: some hundreds where there are enough."""
    return next(share for most, share in ((500, 0.2), (5000, 0.1), (50_000, 0.05), (math.inf, 0.01)) if rows < most)

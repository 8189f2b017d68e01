"""Attention on NVIDIA Hopper and Blackwell GPUs by the kernels of tokamax, which take bounds of the keys per query.

Documents and windows are such bounds, and blocks outside of them are skipped; queries of a group share their keys.
"""

import jax
from absl import flags
from tokamax._src.ops.attention import base
from tokamax._src.ops.attention.api import IMPLEMENTATIONS as FORMS

from llm3.errors import UserError
from llm3.models.attention.pattern import Pattern


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    pattern: Pattern,
    scale: float = 0.0,
    softcap: float = 0.0,
    interpret: bool = False,
) -> jax.Array:
    """softmax(scale q k^T) v where the pattern allows; arguments and result as of `plain.attend`.

    The pattern is in order and without a prefix. interpret: compute the same by tokamax's form in XLA, on any device.
    Raises UserError on another GPU.
    """
    if not flags.FLAGS.is_parsed():  # else tokamax reads the command line, and refuses what is not its own
        flags.FLAGS.mark_as_parsed()
    first, stop = (each[:, None] for each in pattern.key_bounds())
    mask = base.Mask(k_start=first, is_causal=True) if pattern.causal else base.Mask(k_start=first, k_end=stop)
    options = {"logits_scale": scale or query.shape[-1] ** -0.5, "logits_soft_cap": softcap or None}
    try:
        return FORMS["xla_chunked" if interpret else "mosaic_gpu"](query, key, value, mask=mask, **options)
    except NotImplementedError as error:
        raise UserError(f"config.model.attention='tokamax': {error}") from error

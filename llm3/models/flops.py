"""FLOPs of the model by formula: model FLOPs, and hardware FLOPs, which also count what is computed again.

A multiply-add counts as two. Element-wise work (norms, softmax, rotations, the optimizer) is not counted, as is usual
for model FLOPs (Chowdhery et al. 2022, PaLM, appendix B).
"""

import dataclasses
from typing import NamedTuple

from llm3.config.model_schema import ModelConfig
from llm3.models.attention.plain import query_blocks
from llm3.models.cross_entropy import blocks
from llm3.segments import STACK, Segments, segment_name


class Shape(NamedTuple):
    """What FLOPs depend on besides the model.

    batch, length: the tokens of a step. head: "lm" or "task". positions: the number of positions of a row at which a
    layer is computed; its keys and values are always computed at all. context, vocab: the pieces into which a window
    and the vocabulary are cut.
    """

    batch: int
    length: int
    head: str
    positions: int
    context: int = 1
    vocab: int = 1

    @property
    def computed(self) -> int:
        return self.batch * self.positions

    def tokens_of(self, projection: str) -> int:
        return self.batch * (self.length if projection in ("key", "value") else self.positions)


def forward_flops(config: ModelConfig, batch: int, length: int, head: str) -> float:
    """FLOPs of a forward pass over [batch, length] tokens, with `head` "lm" or "task", without a gradient."""
    shape = Shape(batch, length, head, length)
    layer = _layer_forward(config, shape) - _skipped(config, shape)
    return config.layers * layer + _pool(config, shape) + _head(config, shape)


def model_flops(
    config: ModelConfig,
    batch: int,
    length: int,
    head: str,
    segments: Segments | None = None,
    trainable: frozenset[str] | None = None,
) -> tuple[float, float]:
    """Model FLOPs of one train step, as (forward, backward); the arguments are those of `step_flops`.

    They count nothing twice, and so do not depend on remat, on blocks of the vocabulary or on the mesh. Over time and
    peak they are the model FLOPs utilization (MFU: Chowdhery et al. 2022, PaLM, appendix B).
    """
    once = dataclasses.replace(config, remat="none", vocab_block=config.padded_vocab_size)
    return step_flops(once, batch, length, head, segments, trainable)


def step_flops(
    config: ModelConfig,
    batch: int,
    length: int,
    head: str,
    segments: Segments | None = None,
    trainable: frozenset[str] | None = None,
    context: int = 1,
    vocab: int = 1,
) -> tuple[float, float]:
    """Hardware FLOPs of one train step over [batch, length] tokens (all micro-batches), as (forward, backward).

    segments, trainable: the fields of a `Partition`; None: every parameter is trainable. The rules of the count:
    - A matrix product costs once forward, once backward for the gradient of its input if any parameter below it is
      trainable, and once for the gradient of its weights if they are trainable.
    - In layers with a backward pass, remat "full" recomputes all products but the last, "dots" and "offload" only the
      scores.
    - A causal segment without a backward pass skips a part of the keys, unless windows are cut (`context` > 1).
    - With `max_output_positions`, the last layer is computed at that many positions only.
    - Logits in blocks of the vocabulary are computed again in the backward pass; the last two blocks may overlap.
    - Scores outside a sliding window are computed and masked, so a window changes nothing.
    - The stack is unrolled. A scan also computes the unneeded input gradient of the lowest trainable layer (up to 3 %).
    """
    shape = top = Shape(batch, length, head, length, context, vocab)
    if config.max_output_positions:
        top = shape._replace(positions=config.max_output_positions)  # the last layer
    trains = _TrainableLeaves(trainable, "")
    forward = backward = 0.0
    below = trains.any_of("embed")  # does anything under this point need a gradient?
    for first, last in segments or ((0, config.layers),):
        segment = f"{STACK}/{segment_name(first, last)}"
        differentiated = below or trains.any_of(segment)
        for layer in range(first, last):
            here = top if layer == config.layers - 1 else shape
            forward += _layer_forward(config, here) - (0 if differentiated else _skipped(config, here))
            cost, below = _layer_backward(config, here, _TrainableLeaves(trainable, f"{segment}/"), below)
            backward += cost
    below = below or trains.any_of("final_norm")
    return forward + _pool(config, top) + _head(config, top), backward + _head_backward(config, top, trains, below)


class _TrainableLeaves(NamedTuple):
    """Whether leaves below `prefix` are trainable. paths: all trainable paths; None: every leaf."""

    paths: frozenset[str] | None
    prefix: str

    def __call__(self, name: str) -> bool:
        return self.paths is None or self.prefix + name in self.paths

    def any_of(self, *modules: str) -> bool:
        return self.paths is None or any(
            path.startswith(f"{self.prefix}{module}/") for path in self.paths for module in modules
        )


def _sizes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of each projection of a layer."""
    heads, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    d, f = config.d_model, config.d_ff
    sizes = {"query": (d, heads), "key": (d, kv), "value": (d, kv), "out": (heads, d)}
    return sizes | ({"gate": (d, f)} if config.gated_mlp else {}) | {"up": (d, f), "down": (f, d)}


def _layer_backward(config: ModelConfig, shape: Shape, trains: _TrainableLeaves, below: bool) -> tuple[float, bool]:
    """FLOPs of the backward pass of one layer, and whether its output needs a gradient."""
    total = 0.0

    def through(module: str, name: str, below: bool) -> bool:
        """Add the backward pass of a projection. Return whether its output needs a gradient."""
        nonlocal total
        total += _projection_backward(config, shape, name, below, trains, f"{module}/{name}")
        return below or trains.any_of(f"{module}/{name}")

    norm_first = config.block not in ("after", "post")
    normed = below or (norm_first and trains.any_of("attention_norm"))
    query = through("attention", "query", normed) or trains.any_of("attention/query_norm")
    key = through("attention", "key", normed) or trains.any_of("attention/key_norm")
    value = through("attention", "value", normed)
    half = _scores(config, shape) / 2  # one of q k^T and p v
    total += half * (query + key + (query or key) + value)
    inner = query or key or value
    attended = through("attention", "out", inner)
    if config.remat in ("dots", "offload"):
        total += half * ((inner or trains("attention/out/kernel")) + (query or key or trains("attention/out/kernel")))
    attended = attended or trains.any_of("attention_norm", "attention_out_norm")
    if config.block != "parallel_one_norm":
        normed = below if config.block == "parallel" else attended
        normed = normed or (norm_first and trains.any_of("mlp_norm"))
    up = through("mlp", "up", normed)
    gate = config.gated_mlp and through("mlp", "gate", normed)
    below = through("mlp", "down", gate or up) or attended or trains.any_of("mlp_norm", "mlp_out_norm")
    if below and config.remat == "full":
        total += _layer_forward(config, shape) - _last_products(config, shape)
    return total, below


def _projection_backward(
    config: ModelConfig, shape: Shape, name: str, below: bool, trains: _TrainableLeaves, module: str
) -> float:
    inputs, outputs = _sizes(config)[name]
    tokens = shape.tokens_of(name)
    total = 2 * tokens * inputs * outputs * (below + trains(f"{module}/kernel"))
    for adapter, rank in _ranks(config, name):
        a, b = trains(f"{module}/lora/{adapter}/a"), trains(f"{module}/lora/{adapter}/b")
        total += 2 * tokens * rank * (outputs * ((a or below) + b) + inputs * (a + below))
    return total


def _ranks(config: ModelConfig, name: str) -> list[tuple[str, int]]:
    """The active adapters of a projection, as (name, rank)."""
    return [(adapter, each.rank) for adapter, each in config.adapters if each.active and name in each.targets]


def _layer_forward(config: ModelConfig, shape: Shape) -> float:
    total = _scores(config, shape)
    for name, (inputs, outputs) in _sizes(config).items():
        rank = sum(rank for _, rank in _ranks(config, name))
        total += 2 * shape.tokens_of(name) * (inputs * outputs + rank * (inputs + outputs))
        # DoRA's norms need A B itself
        dora = [each for _, each in config.adapters if each.active and each.dora and name in each.targets]
        total += sum(2 * inputs * each.rank * outputs for each in dora)
    return total


def _last_products(config: ModelConfig, shape: Shape) -> float:
    """The products that remat does not recompute: those that are added to the output of the layer as they are."""
    last = {"pre": ("down",), "parallel": ("out", "down"), "parallel_one_norm": ("out", "down")}
    total = 0.0
    for name in last.get(config.block, ()):
        rank = sum(rank for _, rank in _ranks(config, name))
        total += 2 * shape.computed * config.d_model * (_sizes(config)[name][0] + rank)
    return total


def _scores(config: ModelConfig, shape: Shape) -> float:
    return 4 * shape.computed * shape.length * config.heads * config.head_dim


def _skipped(config: ModelConfig, shape: Shape) -> float:
    """FLOPs of the scores that the query blocks of `attend` skip in a layer without a gradient."""
    in_blocks = config.causal and shape.positions == shape.length and shape.context == 1
    blocks = query_blocks(shape.length) if in_blocks else 1
    return _scores(config, shape) * (blocks - 1) / (2 * blocks)


def _pool(config: ModelConfig, shape: Shape) -> float:
    """The mean over a document, or its first position, at every position: of the logits, or of what a pooler reads."""
    if shape.head != "task" or config.pool == "last":
        return 0
    return 2 * shape.computed * shape.length * (config.d_model if _pools_hidden(config) else config.classes)


def _pools_hidden(config: ModelConfig) -> bool:
    return config.pooler and config.pool == "mean"


def _head(config: ModelConfig, shape: Shape) -> float:
    before, last = _head_products(config, shape)
    return before + last


def _head_products(config: ModelConfig, shape: Shape) -> tuple[float, float]:
    """(dense layer before a head, head): `lm_transform` or the pooler, 0 without one; the logits."""
    if shape.head != "lm":
        unit = 2 * shape.computed * config.d_model
        return unit * config.d_model * config.pooler, unit * config.classes
    unit, (count, size) = 2 * shape.computed * config.d_model, _blocks(config, shape)
    return unit * config.d_model * config.lm_transform, unit * shape.vocab * count * size


def _blocks(config: ModelConfig, shape: Shape) -> tuple[int, int]:
    return blocks(config.padded_vocab_size // shape.vocab, config.vocab_block)


def _head_backward(config: ModelConfig, shape: Shape, trains: _TrainableLeaves, below: bool) -> float:
    """FLOPs of the backward pass of the head and the pool. below: whether the last hidden states need a gradient."""
    before, last = _head_products(config, shape)
    if shape.head == "lm":
        inner = below or trains.any_of("lm_transform")
        kernel = trains("embed/embedding" if config.tie_embeddings else "lm_head/kernel")
        again = _blocks(config, shape)[0] > 1 and (inner or kernel or trains("lm_head/bias"))
        return before * (below + trains("lm_transform/dense/kernel")) + last * (inner + kernel + again)
    inner = below or (config.pooler and trains.any_of("pooler"))
    pooled = below if _pools_hidden(config) else inner or trains.any_of("head")  # the head comes before the pool
    total = before * (below + trains("pooler/kernel")) + last * (inner + trains("head/kernel"))
    return total + _pool(config, shape) * pooled

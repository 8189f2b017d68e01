"""FLOPs of the model as it is really executed, by formula.

A multiply and an add count as two. Element-wise work (norms, softmax, rotations, the optimizer) is not counted, as is
usual for model FLOPs (Chowdhery et al. 2022, PaLM, appendix B).
"""

from typing import NamedTuple

from llm3.config.schema import ModelConfig
from llm3.models.kernels import query_blocks
from llm3.segments import STACK, Segments, segment_name


class Shape(NamedTuple):
    """What FLOPs depend on besides the model: the tokens of a step, the head ("lm" or "task"), and at how many
    places of a row a layer is computed (but for its keys and values, which are those of all); into how many pieces a
    window is cut.
    """

    batch: int
    length: int
    head: str
    places: int
    context: int = 1

    @property
    def computed(self) -> int:
        return self.batch * self.places

    def tokens_of(self, projection: str) -> int:
        return self.batch * (self.length if projection in ("key", "value") else self.places)


def forward_flops(config: ModelConfig, batch: int, length: int, head: str) -> float:
    """FLOPs of a forward pass over [batch, length] tokens, with `head` "lm" or "task", outside of gradients."""
    shape = Shape(batch, length, head, length)
    layer = _layer_forward(config, shape) - _skipped(config, shape)
    return config.layers * layer + _pool(config, shape) + _head(config, shape)


def step_flops(
    config: ModelConfig,
    batch: int,
    length: int,
    head: str,
    segments: Segments | None = None,
    trainable: frozenset[str] | None = None,
    context: int = 1,
) -> tuple[float, float]:
    """FLOPs of one train step over [batch, length] tokens (all micro-batches together): forward, and backward.

    `segments` and `trainable` are those of a Partition; without them everything trains. A matrix product costs once
    forward, once more backward for its input where anything below it trains, and once more for its weights where they
    train. Remat adds, in the layers that have a backward pass, what that pass reads of the forward pass: all but the
    last product ("dots": scores only). A causal segment that has no backward pass reads a share of the keys only, if
    windows are not cut into `context` pieces; the last layer is computed at the places of labels only, where the model
    knows how many there are. Logits that are held in chunks are computed again. Counted of an unrolled stack: a scan
    also takes the input gradient of the lowest layer that trains, where it needs none (up to 3 % of a step).
    """
    shape = top = Shape(batch, length, head, length, context)
    if config.max_output_positions:
        top = shape._replace(places=config.max_output_positions)  # of the last layer
    trains = _Trains(trainable, "")
    forward = backward = 0.0
    below = trains("embed/embedding")  # does anything under this point need a gradient?
    for first, last in segments or ((0, config.layers),):
        segment = f"{STACK}/{segment_name(first, last)}"
        differentiated = below or trains.any_of(segment)
        for layer in range(first, last):
            here = top if layer == config.layers - 1 else shape
            forward += _layer_forward(config, here) - (0 if differentiated else _skipped(config, here))
            cost, below = _layer_backward(config, here, _Trains(trainable, f"{segment}/"), below)
            backward += cost
    below = below or trains.any_of("final_norm")
    lm_kernel = "embed/embedding" if config.tie_embeddings else "lm_head/kernel"
    kernel = lm_kernel if head == "lm" else "head/kernel"
    pooled = below or trains.any_of("head")  # the head comes before the pool
    forward += _pool(config, top) + _head(config, top)
    again = head == "lm" and 0 < config.logit_chunk < top.places and (below or trains(kernel))
    backward += _pool(config, top) * pooled + _head(config, top) * (below + trains(kernel) + again)
    return forward, backward


class _Trains(NamedTuple):
    """Which leaves below a prefix train; `paths` None: all."""

    paths: frozenset[str] | None
    prefix: str

    def __call__(self, name: str) -> bool:
        return self.paths is None or self.prefix + name in self.paths

    def any_of(self, *modules: str) -> bool:
        return self.paths is None or any(
            path.startswith(f"{self.prefix}{module}/") for path in self.paths for module in modules
        )


def _sizes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """The inputs and outputs of each projection of a layer."""
    heads, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    d, f = config.d_model, config.d_ff
    return {"query": (d, heads), "key": (d, kv), "value": (d, kv), "out": (heads, d)} | {
        "gate": (d, f),
        "up": (d, f),
        "down": (f, d),
    }


def _layer_backward(config: ModelConfig, shape: Shape, trains: _Trains, below: bool) -> tuple[float, bool]:
    """FLOPs backward of one layer, and whether anything up to its output needs a gradient."""
    total = 0.0

    def through(module: str, name: str, below: bool) -> bool:
        """Add a projection's backward pass; whether its output needs a gradient."""
        nonlocal total
        total += _projection_backward(config, shape, name, below, trains, f"{module}/{name}")
        return below or trains.any_of(f"{module}/{name}")

    normed = below or trains.any_of("attention_norm")
    query = through("attention", "query", normed) or trains.any_of("attention/query_norm")
    key = through("attention", "key", normed) or trains.any_of("attention/key_norm")
    value = through("attention", "value", normed)
    half = _scores(config, shape) / 2  # one of q k^T and p v
    total += half * (query + key + (query or key) + value)
    inner = query or key or value
    below = through("attention", "out", inner)
    if config.remat == "dots":
        total += half * ((inner or trains("attention/out/kernel")) + (query or key or trains("attention/out/kernel")))
    normed = below or trains.any_of("mlp_norm")
    gate, up = through("mlp", "gate", normed), through("mlp", "up", normed)
    below = through("mlp", "down", gate or up)
    if below and config.remat == "full":
        total += _layer_forward(config, shape) - _last_product(config, shape)
    return total, below


def _projection_backward(
    config: ModelConfig, shape: Shape, name: str, below: bool, trains: _Trains, module: str
) -> float:
    inputs, outputs = _sizes(config)[name]
    tokens = shape.tokens_of(name)
    total = 2 * tokens * inputs * outputs * (below + trains(f"{module}/kernel"))
    for adapter, rank in _ranks(config, name):
        a, b = trains(f"{module}/lora/{adapter}/a"), trains(f"{module}/lora/{adapter}/b")
        total += 2 * tokens * rank * (outputs * ((a or below) + b) + inputs * (a + below))
    return total


def _ranks(config: ModelConfig, name: str) -> list[tuple[str, int]]:
    """The adapters at work on a projection, with their ranks."""
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


def _last_product(config: ModelConfig, shape: Shape) -> float:
    """What a recomputed layer need not recompute: the products whose result is the layer's own output."""
    rank = sum(rank for _, rank in _ranks(config, "down"))
    return 2 * shape.computed * config.d_model * (config.d_ff + rank)


def _scores(config: ModelConfig, shape: Shape) -> float:
    return 4 * shape.computed * shape.length * config.heads * config.head_dim


def _skipped(config: ModelConfig, shape: Shape) -> float:
    """Of the scores of a layer, what the blocks of `attend` leave out where nothing is differentiated."""
    in_blocks = config.causal and shape.places == shape.length and shape.context == 1
    blocks = query_blocks(shape.length) if in_blocks else 1
    return _scores(config, shape) * (blocks - 1) / (2 * blocks)


def _pool(config: ModelConfig, shape: Shape) -> float:
    if shape.head != "task" or config.pool != "mean":
        return 0
    return 2 * shape.computed * shape.length * config.classes


def _head(config: ModelConfig, shape: Shape) -> float:
    if shape.head != "lm":
        return 2 * shape.computed * config.d_model * config.classes
    chunk = config.logit_chunk if 0 < config.logit_chunk < shape.places else shape.places
    return 2 * shape.batch * -(-shape.places // chunk) * chunk * config.d_model * config.vocab_size

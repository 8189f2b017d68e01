"""FLOPs of the model as it is really executed, by formula; and the peak rates of known chips.

A multiply and an add count as two. Element-wise work (norms, softmax, rotations, the optimizer) is not counted, as is
usual for model FLOPs (Chowdhery et al. 2022, PaLM, appendix B).
"""

from collections.abc import Callable

from llm3.config import ModelConfig
from llm3.models.transformer import Segments

# Dense bfloat16 peak, FLOP/s for one device as jax counts devices, by the start of `device_kind`.
PEAK_FLOPS: dict[str, float] = {
    "NVIDIA A100": 312e12,  # NVIDIA A100 datasheet, 2021
    "NVIDIA H100 PCIe": 756e12,  # NVIDIA H100 datasheet, 2023, without sparsity
    "NVIDIA H100": 989e12,  # the same, SXM
    "NVIDIA H200": 989e12,  # NVIDIA H200 datasheet, 2024, without sparsity
    "NVIDIA L4": 121e12,  # NVIDIA L4 datasheet, 2023, without sparsity
    "TPU v3": 61.5e12,  # Google Cloud documentation: 123 TFLOP/s a chip of two cores
    "TPU v4": 275e12,  # Google Cloud documentation
    "TPU v5 lite": 197e12,  # Google Cloud documentation, v5e
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # Google Cloud documentation, v5p
    "TPU v6 lite": 918e12,  # Google Cloud documentation, v6e
    "TPU v6e": 918e12,
}


def peak_flops(device_kind: str) -> float | None:
    """The dense bfloat16 peak of one device, or None where it is not known."""
    matches = [name for name in PEAK_FLOPS if device_kind.startswith(name)]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None


def forward_flops(config: ModelConfig, batch: int, length: int, head: str) -> float:
    """FLOPs of a forward pass over [batch, length] tokens, with `head` "lm" or "task"."""
    tokens = batch * length
    layer = _matmul(config, tokens) + _scores(config, batch, length)
    return config.layers * layer + _pool(config, batch, length, head) + _head(config, tokens, head)


def step_flops(
    config: ModelConfig,
    batch: int,
    length: int,
    head: str,
    segments: Segments | None = None,
    trainable: frozenset[str] | None = None,
) -> float:
    """FLOPs of one train step over [batch, length] tokens (all micro-batches together).

    `segments` and `trainable` are those of a Partition; without them everything trains. A matrix product costs once
    forward, once more backward for its input where anything below it trains, and once more for its weights where they
    train. Remat adds, in the layers that have a backward pass, what that pass reads of the forward pass: all but the
    last product ("dots": scores only).
    """
    tokens = batch * length
    trains = (lambda path: True) if trainable is None else trainable.__contains__
    total = forward_flops(config, batch, length, head)
    below = trains("embed/embedding")  # does anything under this point need a gradient?
    for first, last in segments or ((0, config.layers),):
        for _ in range(first, last):
            cost, below = _layer_backward(config, batch, length, f"layers/{first}:{last}/", trains, below)
            total += cost
    below = below or trains("final_norm/scale") or trains("final_norm/bias")
    lm_kernel = "embed/embedding" if config.tie_embeddings else "lm_head/kernel"
    kernel = lm_kernel if head == "lm" else "head/kernel"
    return total + _pool(config, batch, length, head) * below + _head(config, tokens, head) * (below + trains(kernel))


def _layer_backward(
    config: ModelConfig, batch: int, length: int, prefix: str, trains: Callable[[str], bool], below: bool
) -> tuple[float, bool]:
    """FLOPs backward of one layer, and whether anything up to its output needs a gradient."""
    tokens, total = batch * length, 0.0

    def any_of(*names: str) -> bool:
        return any(trains(f"{prefix}{name}/{leaf}") for name in names for leaf in ("kernel", "bias", "scale"))

    normed = below or any_of("attention_norm")
    for name, size in (("query", config.heads), ("key", config.kv_heads), ("value", config.kv_heads)):
        product = 2 * tokens * config.d_model * size * config.head_dim
        total += product * (normed + trains(f"{prefix}attention/{name}/kernel"))
    query = normed or any_of("attention/query", "attention/query_norm")
    key = normed or any_of("attention/key", "attention/key_norm")
    value = normed or any_of("attention/value")
    half = _scores(config, batch, length) / 2  # one of q k^T and p v
    total += half * (query + key + (query or key) + value)
    inner = query or key or value
    product = 2 * tokens * config.heads * config.head_dim * config.d_model
    total += product * (inner + trains(f"{prefix}attention/out/kernel"))
    if config.remat == "dots":
        output = trains(f"{prefix}attention/out/kernel")
        total += half * ((inner or output) + (query or key or output))
    below = inner or any_of("attention/out")
    normed = below or any_of("mlp_norm")
    product = 2 * tokens * config.d_model * config.d_ff
    total += product * (2 * normed + trains(f"{prefix}mlp/gate/kernel") + trains(f"{prefix}mlp/up/kernel"))
    hidden = normed or any_of("mlp/gate", "mlp/up")
    total += product * (hidden + trains(f"{prefix}mlp/down/kernel"))
    below = hidden or any_of("mlp/down")
    if below and config.remat == "full":
        total += _matmul(config, tokens) - product + _scores(config, batch, length)
    return total, below


def _matmul(config: ModelConfig, tokens: int) -> float:
    heads = 2 * config.heads + 2 * config.kv_heads
    return 2 * tokens * config.d_model * (heads * config.head_dim + 3 * config.d_ff)


def _scores(config: ModelConfig, batch: int, length: int) -> float:
    return 4 * batch * length * length * config.heads * config.head_dim


def _pool(config: ModelConfig, batch: int, length: int, head: str) -> float:
    return 2 * batch * length * length * config.d_model if head == "task" and config.pool == "mean" else 0


def _head(config: ModelConfig, tokens: int, head: str) -> float:
    return 2 * tokens * config.d_model * (config.vocab_size if head == "lm" else config.classes)

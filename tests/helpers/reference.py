"""The transformer once more, in numpy and float64, position by position where that is the plain way."""

import numpy as np
from scipy.special import erf

from llm3.config.schema import ModelConfig
from llm3.data.batch import Batch


def norm(config: ModelConfig, weights: dict, x: np.ndarray, axes: int = 1) -> np.ndarray:
    """Over the last `axes` axes together."""
    flat = x.reshape(*x.shape[: x.ndim - axes], -1)
    centred = flat if config.norm == "rmsnorm" else flat - flat.mean(-1, keepdims=True)
    y = (centred / np.sqrt((centred**2).mean(-1, keepdims=True) + config.norm_epsilon)).reshape(x.shape)
    return y * (weights["scale"] + config.norm_unit_offset) + (weights["bias"] if config.norm == "layernorm" else 0)


def frequencies(config: ModelConfig, layer: int) -> np.ndarray:
    """The rotary frequencies of a layer; zeros: it has no rotary positions."""
    size = int(config.head_dim * config.rope_fraction)
    windowed = config.window and layer not in config.full_attention_layers
    apart = windowed and config.window_rope_theta
    found = (config.window_rope_theta if apart else config.rope_theta) ** (-np.arange(0, size, 2) / size)
    if layer in config.no_rope_layers or config.positions != "rope":
        return np.zeros(size // 2)
    scaling = config.rope_scaling
    if scaling is None or apart:
        return found
    if scaling.kind == "linear":
        return found / scaling.factor
    wavelengths, old = 2 * np.pi / found, scaling.original_max_positions
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = (old / wavelengths - low) / (high - low)
    between = (1 - smooth) * found / scaling.factor + smooth * found
    long, short = wavelengths > old / low, wavelengths < old / high
    return np.where(long, found / scaling.factor, np.where(short, found, between))


def rope(x: np.ndarray, positions: np.ndarray, turns: np.ndarray | float, interleaved: bool = False) -> np.ndarray:
    """x: [T, heads, h]. Channel i turns with channel i + half (or 2i with 2i + 1), as complex numbers.

    turns: the frequencies [half], or theta.
    """
    if isinstance(turns, float):
        turns = turns ** (-2 * np.arange(x.shape[-1] // 2) / x.shape[-1])
    half = len(turns)
    first = np.arange(half) * 2 if interleaved else np.arange(half)
    second = first + 1 if interleaved else first + half
    turned = (x[..., first] + 1j * x[..., second]) * np.exp(1j * positions[:, None, None] * turns)
    y = x.copy()
    y[..., first], y[..., second] = turned.real, turned.imag
    return y


def project(weights: dict, x: np.ndarray) -> np.ndarray:
    """x: [T, *inputs] -> [T, *outputs]."""
    return np.tensordot(x, weights["kernel"], axes=x.ndim - 1) + weights.get("bias", 0)


def allowed_keys(config: ModelConfig, row: Batch, t: int, layer: int) -> np.ndarray:
    """Which positions the query at t attends to, bool [T]."""
    distance = row.positions[t] - row.positions
    allowed = row.segments == row.segments[t]
    if config.causal:
        allowed = allowed & (distance >= 0)
    if config.window and layer not in config.full_attention_layers:
        allowed = allowed & (distance < config.window if config.causal else np.abs(distance) <= config.window // 2)
    return allowed


def attention(config: ModelConfig, weights: dict, x: np.ndarray, row: Batch, layer: int) -> np.ndarray:
    query, key, value = (project(weights[name], x) for name in ("query", "key", "value"))
    if config.qk_norm != "none":
        axes = 1 if config.qk_norm == "head" else 2
        query, key = norm(config, weights["query_norm"], query, axes), norm(config, weights["key_norm"], key, axes)
    turns = frequencies(config, layer), config.rope_interleaved
    query, key = rope(query, row.positions, *turns), rope(key, row.positions, *turns)
    mixed = np.zeros_like(query)
    for t in range(len(x)):
        allowed = allowed_keys(config, row, t, layer)
        for head in range(config.heads):
            shared = head * config.kv_heads // config.heads
            scores = key[allowed, shared] @ query[t, head] * (config.attention_scale or 1 / np.sqrt(config.head_dim))
            if config.attention_softcap:
                scores = config.attention_softcap * np.tanh(scores / config.attention_softcap)
            p = np.exp(scores - scores.max())
            mixed[t, head] = p / p.sum() @ value[allowed, shared]
    return project(weights["out"], mixed)


def activation(config: ModelConfig, x: np.ndarray) -> np.ndarray:
    if config.activation == "silu":
        return x / (1 + np.exp(-x))
    if config.activation == "gelu":
        return x * (1 + erf(x / np.sqrt(2))) / 2
    return x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2


def mlp(config: ModelConfig, weights: dict, x: np.ndarray) -> np.ndarray:
    up = project(weights["up"], x)
    hidden = activation(config, project(weights["gate"], x)) * up if config.gated_mlp else activation(config, up)
    return project(weights["down"], hidden)


def slice_layer(tree: dict, layer: int) -> dict:
    return {k: slice_layer(v, layer) if isinstance(v, dict) else v[layer].astype(np.float64) for k, v in tree.items()}


def embedded(config: ModelConfig, weights: dict, row: Batch) -> np.ndarray:
    x = weights["embedding"].astype(np.float64)[row.tokens] * config.embedding_scale
    if config.positions == "learned":
        x = x + weights["position"][row.positions + config.position_offset]
    if config.token_types:
        x = x + weights["token_type"][0]
    return norm(config, weights["norm"], x) if config.embedding_norm else x


def block(config: ModelConfig, weights: dict, x: np.ndarray, row: Batch, layer: int) -> np.ndarray:
    def normed(name: str, y: np.ndarray) -> np.ndarray:
        skipped = config.skip_first_norm and layer == 0 and name == "attention_norm"
        return y if skipped else norm(config, weights[name], y)

    attend = lambda y: attention(config, weights["attention"], y, row, layer)  # noqa: E731
    forward = lambda y: mlp(config, weights["mlp"], y)  # noqa: E731
    if config.block == "parallel":
        return x + attend(normed("attention_norm", x)) + forward(normed("mlp_norm", x))
    if config.block == "parallel_one_norm":
        return x + attend(normed("attention_norm", x)) + forward(normed("attention_norm", x))
    for part, function in (("attention", attend), ("mlp", forward)):
        if config.block == "pre":
            x = x + function(normed(f"{part}_norm", x))
        elif config.block == "sandwich":
            x = x + normed(f"{part}_out_norm", function(normed(f"{part}_norm", x)))
        elif config.block == "after":
            x = x + normed(f"{part}_norm", function(x))
        else:
            x = normed(f"{part}_norm", x + function(x))
    return x


def row_hidden(config: ModelConfig, params: dict, row: Batch) -> np.ndarray:
    """[T, D] after the last norm, for one window."""
    x = embedded(config, params["embed"], row)
    for layer in range(config.layers):
        x = block(config, slice_layer(params["layers"], layer), x, row, layer)
    return norm(config, params["final_norm"], x) if config.final_norm else x


def row_logits(config: ModelConfig, params: dict, hidden: np.ndarray) -> np.ndarray:
    """[T, V]."""
    if config.lm_transform:
        weights = params["lm_transform"]
        hidden = norm(config, weights["norm"], activation(config, project(weights["dense"], hidden)))
    kernel = params["embed"]["embedding"].T if config.tie_embeddings else params["lm_head"]["kernel"]
    y = hidden @ kernel.astype(np.float64) + (params["lm_head"]["bias"] if config.lm_head_bias else 0)
    y = config.logit_softcap * np.tanh(y / config.logit_softcap) if config.logit_softcap else y
    return y[:, : config.vocab_size]


def row_class_logits(config: ModelConfig, params: dict, hidden: np.ndarray, row: Batch) -> np.ndarray:
    """[T, C]."""
    if config.pool == "mean":
        hidden = np.stack([hidden[row.segments == segment].mean(axis=0) for segment in row.segments])
    elif config.pool == "first":
        hidden = np.stack([hidden[row.segments == segment][0] for segment in row.segments])
    return project(params["head"], np.tanh(project(params["pooler"], hidden)) if config.pooler else hidden)


def rows(batch: Batch) -> list[Batch]:
    return [Batch(*each) for each in zip(*batch, strict=True)]


def logits(config: ModelConfig, params: dict, batch: Batch) -> np.ndarray:
    """[B, T, V]."""
    return np.stack([row_logits(config, params, row_hidden(config, params, row)) for row in rows(batch)])


def class_logits(config: ModelConfig, params: dict, batch: Batch) -> np.ndarray:
    """[B, T, C]."""
    return np.stack([row_class_logits(config, params, row_hidden(config, params, row), row) for row in rows(batch)])


def nats(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log softmax(scores) at the targets: [..., V] and [...] -> [...]."""
    shifted = scores - scores.max(axis=-1, keepdims=True)
    picked = np.take_along_axis(shifted, targets[..., None], axis=-1)[..., 0]
    return np.log(np.exp(shifted).sum(axis=-1)) - picked

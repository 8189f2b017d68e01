"""The transformer once more, in numpy and float64, position by position where that is the plain way."""

import numpy as np

from llm3.config.schema import ModelConfig
from llm3.data.batch import Batch


def norm(config: ModelConfig, weights: dict, x: np.ndarray) -> np.ndarray:
    if config.norm == "layernorm":
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + config.norm_epsilon)
        return y * weights["scale"] + weights["bias"]
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon) * weights["scale"]


def rope(x: np.ndarray, positions: np.ndarray, theta: float) -> np.ndarray:
    """x: [T, heads, h]. Channel i turns with channel i + h/2, as complex numbers."""
    half = x.shape[-1] // 2
    turn = np.exp(1j * positions[:, None, None] * theta ** (-2 * np.arange(half) / x.shape[-1]))
    turned = (x[..., :half] + 1j * x[..., half:]) * turn
    return np.concatenate([turned.real, turned.imag], axis=-1)


def project(weights: dict, x: np.ndarray) -> np.ndarray:
    """x: [T, *inputs] -> [T, *outputs]."""
    return np.tensordot(x, weights["kernel"], axes=x.ndim - 1) + weights.get("bias", 0)


def attention(config: ModelConfig, weights: dict, x: np.ndarray, row: Batch) -> np.ndarray:
    query, key, value = (project(weights[name], x) for name in ("query", "key", "value"))
    if config.qk_norm:
        query, key = norm(config, weights["query_norm"], query), norm(config, weights["key_norm"], key)
    query, key = rope(query, row.positions, config.rope_theta), rope(key, row.positions, config.rope_theta)
    mixed = np.zeros_like(query)
    for t in range(len(x)):
        allowed = row.segments == row.segments[t]
        if config.causal:
            allowed &= row.positions <= row.positions[t]
        for head in range(config.heads):
            shared = head * config.kv_heads // config.heads
            scores = key[allowed, shared] @ query[t, head] / np.sqrt(config.head_dim)
            p = np.exp(scores - scores.max())
            mixed[t, head] = p / p.sum() @ value[allowed, shared]
    return project(weights["out"], mixed)


def mlp(weights: dict, x: np.ndarray) -> np.ndarray:
    gate = project(weights["gate"], x)
    return project(weights["down"], gate / (1 + np.exp(-gate)) * project(weights["up"], x))


def slice_layer(tree: dict, layer: int) -> dict:
    return {k: slice_layer(v, layer) if isinstance(v, dict) else v[layer].astype(np.float64) for k, v in tree.items()}


def row_hidden(config: ModelConfig, params: dict, row: Batch) -> np.ndarray:
    """[T, D] after the last norm, for one window."""
    x = params["embed"]["embedding"].astype(np.float64)[row.tokens]
    for layer in range(config.layers):
        weights = slice_layer(params["layers"], layer)
        x = x + attention(config, weights["attention"], norm(config, weights["attention_norm"], x), row)
        x = x + mlp(weights["mlp"], norm(config, weights["mlp_norm"], x))
    return norm(config, params["final_norm"], x)


def row_logits(config: ModelConfig, params: dict, hidden: np.ndarray) -> np.ndarray:
    """[T, V]."""
    kernel = params["embed"]["embedding"].T if config.tie_embeddings else params["lm_head"]["kernel"]
    y = hidden @ kernel.astype(np.float64)
    return config.logit_softcap * np.tanh(y / config.logit_softcap) if config.logit_softcap else y


def row_class_logits(config: ModelConfig, params: dict, hidden: np.ndarray, row: Batch) -> np.ndarray:
    """[T, C]."""
    if config.pool == "mean":
        hidden = np.stack([hidden[row.segments == segment].mean(axis=0) for segment in row.segments])
    return project(params["head"], hidden)


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

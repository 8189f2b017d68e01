"""What the readers and writers of config.json share: sizes, rotary positions, windows and activations.

Older files have rope_theta and rope_scaling at the top level; transformers 5 writes rope_parameters, for some families
one for each type of layer. Both are read.
"""

import math
from typing import Any

from llm3.config.model_schema import ModelConfig, RopeScaling
from llm3.errors import UserError, nearest

Json = dict[str, Any]
Fields = dict[str, Any]  # of a ModelConfig

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
FULL, SLIDING = "full_attention", "sliding_attention"
SCALINGS = {"linear": "linear", "llama3": "llama3", "default": ""}
_SCALING_KEYS = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_positions": "original_max_position_embeddings",
}


def need(config: Json, key: str) -> Any:
    """A value that config.json must have. Raises UserError."""
    if config.get(key) is None:
        raise UserError(f"config.json has no {key!r}")
    return config[key]


def expect(config: Json, **values: Any) -> None:
    """Raise UserError unless each of these keys is missing, null, or has the one value that llm3 computes."""
    for key, value in values.items():
        if (found := config.get(key)) is not None and found != value:
            raise UserError(f"config.json: {key}={found!r} is not what llm3 computes; expected {value!r}")


def tidy(number: float) -> float:
    """A number that went through float32, as it was written: 9.999999747378752e-06 is 1e-05."""
    return float(f"{number:.6g}")


def sizes(config: Json) -> Fields:
    """The sizes of a model, with the keys of Llama."""
    heads, width = need(config, "num_attention_heads"), need(config, "hidden_size")
    return {
        "layers": need(config, "num_hidden_layers"),
        "d_model": width,
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or width // heads,
        "d_ff": need(config, "intermediate_size"),
        "vocab_size": need(config, "vocab_size"),
        "tie_embeddings": bool(config["tie_word_embeddings"]),
    }


def write_sizes(model: ModelConfig) -> dict[str, Any]:
    """The inverse of `sizes`."""
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.d_ff,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "tie_word_embeddings": model.tie_embeddings,
    }


def heads_divide(model: ModelConfig, family: str) -> None:
    """Raise UserError unless the number of heads divides the width, as the config of this family demands."""
    if model.d_model % model.heads:
        raise UserError(
            f"model.heads={model.heads} does not divide model.d_model={model.d_model}: transformers' {family} rejects "
            "that; qk_norm='head' (Qwen3) may have such heads"
        )


def activation(name: str) -> str:
    """llm3's name of an activation. Raises UserError."""
    if name not in ACTIVATIONS:
        raise UserError(f"config.json: activation {name!r}: {nearest(name, ACTIVATIONS)}")
    return ACTIVATIONS[name]


def write_activation(model: ModelConfig, tanh: str = "gelu_pytorch_tanh") -> str:
    """transformers' name of the model's activation. tanh: the family's name of the approximate GELU."""
    return tanh if model.activation == "gelu_tanh" else model.activation


def rope(config: Json, *, theta_key: str = "rope_theta", fraction_key: str = "", window_key: str = "") -> Fields:
    """The rotary positions of config.json, with the family's defaults filled in.

    The keys are those of older files. fraction_key: in families whose heads rotate in part. window_key: that of the
    theta of layers with a window, in families that have one.
    Raises UserError for a scaling that llm3 does not compute.
    """
    parameters = config.get("rope_parameters")
    if parameters is None:
        full = {"rope_theta": config[theta_key], **(config.get("rope_scaling") or {})}
        local = {"rope_theta": config[window_key]} if window_key else full
    elif FULL in parameters or SLIDING in parameters:
        full = {"rope_theta": config[theta_key], **(parameters.get(FULL) or {})}
        local = {"rope_theta": config[window_key or theta_key], **(parameters.get(SLIDING) or {})}
    else:
        full = local = {"rope_theta": config[theta_key], **parameters}
    theta, window_theta = float(full["rope_theta"]), float(local["rope_theta"])
    scaling, window_scaling = _scaling(full), _scaling(local)
    if window_scaling not in (None, scaling):
        raise UserError("config.json: rope_parameters scale the layers with a window, but not the others alike")
    same = theta == window_theta and scaling == window_scaling
    return {
        "rope_theta": theta,
        "rope_fraction": float(full.get("partial_rotary_factor") or config[fraction_key]) if fraction_key else 1.0,
        "rope_scaling": scaling,
        "window_rope_theta": 0.0 if same else window_theta,
    }


def _scaling(parameters: Json) -> RopeScaling | None:
    """The scaling of one kind of layers. Raises UserError for another one than linear and llama3."""
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind not in SCALINGS:
        raise UserError(
            f"config.json: rope_type {kind!r}: its scaling of rotary positions is not what llm3 computes; valid: "
            f"{', '.join(SCALINGS)}"
        )
    if not SCALINGS[kind]:
        return None
    keys = _SCALING_KEYS if kind == "llama3" else {"factor": "factor"}
    return RopeScaling(kind=SCALINGS[kind], **{field: need(parameters, key) for field, key in keys.items()})


def write_rope(model: ModelConfig) -> dict[str, Any]:
    """rope_parameters of a family with one for all layers."""
    return {"rope_parameters": _parameters(model.rope_theta, model.rope_scaling, model.rope_fraction)}


def write_rope_by_type(model: ModelConfig) -> dict[str, Any]:
    """rope_parameters of a family with one for each type of layer."""
    same = not model.window_rope_theta
    local = model.rope_theta if same else model.window_rope_theta
    return {
        "rope_parameters": {
            FULL: _parameters(model.rope_theta, model.rope_scaling, model.rope_fraction),
            SLIDING: _parameters(local, model.rope_scaling if same else None, model.rope_fraction),
        }
    }


def _parameters(theta: float, scaling: RopeScaling | None, fraction: float) -> dict[str, Any]:
    written: dict[str, Any] = {"rope_type": scaling.kind if scaling else "default", "rope_theta": theta}
    if fraction != 1:
        written["partial_rotary_factor"] = fraction
    if scaling is not None:
        keys = _SCALING_KEYS if scaling.kind == "llama3" else {"factor": "factor"}
        written |= {key: getattr(scaling, field) for field, key in keys.items()}
    return written


def windows(types: list[str], window: int | None) -> Fields:
    """Sliding windows by the type of each layer. Raises UserError for another type of attention."""
    for kind in types:
        if kind not in (FULL, SLIDING):
            raise UserError(f"config.json: layer_types: {kind!r} is not what llm3 computes; valid: {FULL}, {SLIDING}")
    if not window or SLIDING not in types:
        return {"window": 0, "full_attention_layers": ()}
    return {"window": window, "full_attention_layers": tuple(i for i, kind in enumerate(types) if kind == FULL)}


def layer_types(model: ModelConfig) -> list[str]:
    """transformers' type of each layer."""
    full = range(model.layers) if not model.window else model.full_attention_layers
    return [FULL if layer in full else SLIDING for layer in range(model.layers)]


def is_close(one: Any, other: Any) -> bool:
    """Whether two values of a field are the same, numbers up to the rounding of float32."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6)
    return bool(one == other)

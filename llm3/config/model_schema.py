"""The fields of a model's config, with types and checks: the transformer, its rotary scaling and its adapters."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from llm3.errors import UserError, at_least, nearest, one_of

PROJECTIONS = ("query", "key", "value", "out", "gate", "up", "down")  # names of the kernels of a layer
# valid values of the fields that are names
CHOICES = {
    "block": ("pre", "sandwich", "after", "post", "parallel", "parallel_one_norm"),
    "norm": ("rmsnorm", "layernorm", "layernorm_no_bias"),
    "qk_norm": ("none", "head", "projection"),
    "attention_bias": ("none", "qkv", "all"),
    "activation": ("silu", "gelu", "gelu_tanh"),
    "positions": ("rope", "learned"),
    "pool": ("last", "mean", "first"),
    "attention": ("auto", "plain", "blockwise", "splash", "pallas", "tokamax", "cudnn"),
    "remat": ("none", "full", "dots", "offload"),
    "compute_dtype": ("auto", "float32", "bfloat16"),
    "matmul": ("compute", "int8", "fp8"),
}


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """A low-rank adapter on projections of every layer: y = x W + scale * (dropout(x) A) B."""

    rank: int = 8  # rank of the two low-rank factors
    alpha: float = 16.0  # the adapter's output is scaled by alpha / rank, or by alpha / sqrt(rank) with rslora
    rslora: bool = False  # scale by alpha / sqrt(rank) instead of alpha / rank
    dropout: float = 0.0  # dropout probability on the adapter's input, in training only
    dora: bool = False  # also train a magnitude for each column of the adapted kernel
    targets: tuple[str, ...] = PROJECTIONS  # the projections of each layer that get this adapter
    active: bool = True  # False: kept in the checkpoint, but not computed

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        at_least("adapters.*.rank", self.rank, 1)
        if not self.targets:
            raise UserError(f"config: adapters.*.targets is empty: expected some of {', '.join(PROJECTIONS)}")
        for target in self.targets:
            one_of("adapters.*.targets", target, PROJECTIONS)
        if not self.alpha > 0:
            raise UserError(f"config: adapters.*.alpha={self.alpha!r}: expected a number above 0")
        if not 0 <= self.dropout < 1:
            raise UserError(f"config: adapters.*.dropout={self.dropout!r}: expected a share from 0 up to 1, without 1")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies stretched for windows longer than those of the first training."""

    kind: str  # linear (Chen et al. 2023, position interpolation) or llama3 (Grattafiori et al. 2024, reference code)
    factor: float = 1.0  # the frequencies are divided by this; llama3 divides the low ones only
    low_freq_factor: float = 1.0  # llama3: wavelengths above original_max_positions / this are scaled by the factor
    high_freq_factor: float = 4.0  # llama3: wavelengths below original_max_positions / this are not scaled
    original_max_positions: int = 8192  # llama3: the longest window of the first training

    def __post_init__(self) -> None:
        one_of("model.rope_scaling.kind", self.kind, ("linear", "llama3"))
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_positions"):
            if not getattr(self, name) > 0:
                raise UserError(f"config: model.rope_scaling.{name}={getattr(self, name)!r}: expected a number above 0")
        if self.kind == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise UserError(
                f"config: model.rope_scaling.low_freq_factor={self.low_freq_factor}: expected less than "
                f"high_freq_factor={self.high_freq_factor}"
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The transformer. The run sets some of the fields; a config must not."""

    REMOVED = ("logit_chunk",)  # fields of older versions, which changed no result
    FREE = frozenset(("attention", "remat", "scan_unroll", "vocab_block"))  # other ways to compute the same

    layers: int  # number of transformer layers
    d_model: int  # width of the hidden states
    heads: int  # number of attention heads
    d_ff: int  # width of the MLP's hidden layer
    kv_heads: int = 0  # number of key and value heads; 0: as many as heads
    head_dim: int = 0  # width of one head; 0: d_model // heads
    causal: bool = True  # True: a decoder; False: a bidirectional encoder
    # where the norms of a layer are: pre, x + f(norm(x)); after, x + norm(f(x)) (OLMo 2); sandwich, both (Gemma 2);
    # post, norm(x + f(x)) (BERT); parallel, x + attention(norm1(x)) + mlp(norm2(x)) (GPT-NeoX); parallel_one_norm, the
    # same with one norm for both (GPT-J, Phi)
    block: str = "pre"
    norm: str = "rmsnorm"  # rmsnorm, layernorm or layernorm_no_bias
    norm_epsilon: float = 1e-6  # added to the variance before the square root
    norm_unit_offset: bool = False  # multiply by 1 + scale instead of scale, which then starts at 0 (Gemma)
    skip_first_norm: bool = False  # no norm before the attention of the first layer (ModernBERT)
    final_norm: bool = True  # normalize the output of the last layer
    qk_norm: str = "none"  # normalize queries and keys: none, head (each head) or projection (all heads, OLMo 2)
    attention_bias: str = "none"  # biases of the attention projections: none, qkv (all but out) or all
    attention_scale: float = 0.0  # factor of the attention scores; 0: head_dim ** -0.5
    attention_softcap: float = 0.0  # cap attention scores smoothly at this magnitude (Gemma 2); 0: no cap
    activation: str = "silu"  # of the MLP and of lm_transform: silu, gelu (exact) or gelu_tanh (its approximation)
    gated_mlp: bool = True  # down(activation(gate(x)) * up(x)); False: down(activation(up(x)))
    mlp_bias: bool = False  # add a bias to the projections of the MLP
    positions: str = "rope"  # rope (rotary) or learned (a row for each position, added to the embedding)
    max_positions: int = 0  # learned: the longest window
    position_offset: int = 0  # learned: position 0 reads this row of the table (RoBERTa)
    rope_theta: float = 10_000.0  # base of the rotary position frequencies
    rope_fraction: float = 1.0  # share of each head's channels that rotate, the first ones (GPT-NeoX)
    rope_interleaved: bool = False  # channels 2i and 2i + 1 rotate together (GPT-J), not i and i + half (GPT-NeoX)
    rope_scaling: RopeScaling | None = None  # stretch the rotary frequencies for longer windows
    no_rope_layers: tuple[int, ...] = ()  # layers without rotary positions (NoPE; SmolLM3)
    # sliding window (Longformer, Mistral): causal, the last `window` positions; bidirectional, window // 2 on each
    # side; 0: all positions
    window: int = 0
    full_attention_layers: tuple[int, ...] = ()  # layers without the window
    window_rope_theta: float = 0.0  # rope_theta of the layers with the window, which then have no rope_scaling; 0: same
    embedding_scale: float = 1.0  # factor of the token embeddings (Gemma: sqrt(d_model))
    embedding_norm: bool = False  # normalize the embeddings (BERT)
    token_types: int = 0  # rows of a token type embedding (BERT); all tokens are of type 0; 0: none
    tie_embeddings: bool = True  # the LM head shares the token embedding's weights
    lm_transform: bool = False  # dense, activation and norm before the LM head (BERT)
    lm_transform_bias: bool = True  # add a bias to the dense layer of lm_transform
    lm_head_bias: bool = False  # add a bias to the logits, with a tied LM head too
    logit_softcap: float = 0.0  # cap logits smoothly at this magnitude; 0: no cap
    vocab_multiple: int = 1  # pad the vocabulary's leaves to a multiple of this, so that the mesh divides them
    pool: str = "last"  # input of a task head: the last or the first position of a document, or the mean over all
    pooler: bool = False  # dense layer and tanh between the pool and the task head (BERT)
    # plain (holds all scores), blockwise, splash (TPUs), pallas, tokamax or cudnn (NVIDIA); auto: the best of the first
    # four
    attention: str = "auto"
    # recompute in the backward pass: none, full (everything), dots (all but matmul results), or offload (the same, and
    # the matmul results wait in the host's memory)
    remat: str = "none"
    scan_unroll: int = 1  # layers unrolled in each iteration of the layer scan
    # compute the LM loss over this many tokens of the vocabulary at a time, to save memory; 0: a vocabulary of up to
    # 8,192 tokens per device all at once, a larger one 4,096 at a time
    vocab_block: int = 0
    compute_dtype: str = "auto"  # float32 (never TF32), bfloat16, or auto: bfloat16 on accelerators, float32 on CPUs
    # products with the kernels of attention and MLP: compute (the compute dtype), int8 or fp8 (e4m3), which need qwix;
    # gradients of kernels, quantized frozen kernels, adapters, embeddings and heads stay in the compute dtype
    matmul: str = "compute"
    vocab_size: int = 0  # set by the run: size of the tokenizer's vocabulary, or more rows of a pretrained model
    classes: int = 0  # set by the run: number of labels; 0: no task head
    adapters: Any = ()  # set by the run: the stage's adapters, ((name, AdapterConfig), ...)
    # set by the run: max positions per window whose output the loss uses; 0: unknown
    max_output_positions: int = 0

    def __post_init__(self) -> None:
        read = lambda kind, each: kind(**each) if isinstance(each, Mapping) else each  # noqa: E731
        self._set("adapters", tuple((name, read(AdapterConfig, each)) for name, each in self.adapters))
        self._set("rope_scaling", read(RopeScaling, self.rope_scaling))
        for name in ("full_attention_layers", "no_rope_layers"):
            self._set(name, tuple(getattr(self, name)))
        for name, options in CHOICES.items():
            one_of(f"model.{name}", getattr(self, name), options)
        for name in ("layers", "d_model", "heads", "d_ff", "vocab_multiple", "scan_unroll"):
            at_least(f"model.{name}", getattr(self, name), 1)
        for name in ("max_positions", "position_offset", "window", "token_types", "window_rope_theta", "vocab_block"):
            at_least(f"model.{name}", getattr(self, name), 0)
        if not self.kv_heads:
            self._set("kv_heads", self.heads)
        if not self.head_dim:
            if self.d_model % self.heads:
                raise UserError(f"model.heads={self.heads} does not divide model.d_model={self.d_model}")
            self._set("head_dim", self.d_model // self.heads)
        for name in ("kv_heads", "head_dim"):
            at_least(f"model.{name}", getattr(self, name), 1)
        if not self.norm_epsilon > 0:
            raise UserError(f"config: model.norm_epsilon={self.norm_epsilon}: expected a number above 0")
        if self.heads % self.kv_heads:
            raise UserError(f"model.kv_heads={self.kv_heads} does not divide model.heads={self.heads}")
        _check_positions(self)
        _check_layers(self)
        _check_heads(self)
        _check_adapters(self)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def rotary_dim(self) -> int:
        """The channels of each head that rotate."""
        return int(self.head_dim * self.rope_fraction)

    @property
    def score_scale(self) -> float:
        """The factor of the attention scores."""
        return self.attention_scale or self.head_dim**-0.5

    @property
    def padded_vocab_size(self) -> int:
        """The rows of the token embedding."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


def _check_positions(config: ModelConfig) -> None:
    """Raise UserError for fields of one kind of positions that are set with the other, and for odd rotary channels."""
    learned, defaults = config.positions == "learned", ModelConfig.__dataclass_fields__
    other = ("rope_fraction", "rope_interleaved", "rope_scaling", "no_rope_layers", "window_rope_theta")
    kind = "rope" if learned else "learned"
    for name in other if learned else ("max_positions", "position_offset"):
        if getattr(config, name) != defaults[name].default:
            raise UserError(f"config: model.{name}={getattr(config, name)!r}: expected it only with positions={kind!r}")
    if learned and not config.max_positions:
        raise UserError("config: model.max_positions=0: positions='learned' needs the longest window")
    if not 0 < config.rope_fraction <= 1:
        raise UserError(f"config: model.rope_fraction={config.rope_fraction!r}: expected a share above 0, at most 1")
    if not learned and (config.rotary_dim % 2 or not config.rotary_dim):
        what = f"model.head_dim={config.head_dim}"
        what += f" x rope_fraction={config.rope_fraction}" if config.rope_fraction != 1 else ""
        raise UserError(f"{what} is odd; rotary positions need an even one")


def _check_layers(config: ModelConfig) -> None:
    """Raise UserError for layers that the model has not, and for options of windows without a window."""
    for name in ("full_attention_layers", "no_rope_layers"):
        for layer in getattr(config, name):
            if type(layer) is not int or not 0 <= layer < config.layers:
                raise UserError(
                    f"config: model.{name}: {layer!r}: expected layers from 0 to {config.layers - 1}, counted from the "
                    "bottom"
                )
    for name in ("full_attention_layers", "window_rope_theta"):
        if getattr(config, name) and not config.window:
            raise UserError(f"config: model.{name}={getattr(config, name)!r}: expected it only with a window")
    if config.skip_first_norm and config.block not in ("pre", "sandwich", "parallel"):
        raise UserError(
            f"config: model.skip_first_norm=True: expected it only with block pre, sandwich or parallel, not "
            f"{config.block!r}"
        )


def _check_heads(config: ModelConfig) -> None:
    """Raise UserError for a pool that does not fit the attention, and for numbers out of range."""
    if config.pool == "last" and not config.causal:
        raise UserError("model.pool='last' needs a causal model; a bidirectional one needs pool='mean' or pool='first'")
    if config.pool == "first" and config.causal:
        raise UserError("model.pool='first' needs a bidirectional model; a causal one needs pool='last' or pool='mean'")
    for name in ("attention_scale", "attention_softcap", "logit_softcap"):
        at_least(f"model.{name}", getattr(config, name), 0)
    if not config.embedding_scale > 0:
        raise UserError(f"config: model.embedding_scale={config.embedding_scale!r}: expected a number above 0")


def _check_adapters(config: ModelConfig) -> None:
    """Raise UserError for adapters that cannot be computed together, or that adapt nothing."""
    for target in PROJECTIONS:
        here = [each for _, each in config.adapters if each.active and target in each.targets]
        if len(here) > 1 and any(each.dora for each in here):
            raise UserError(f"config: adapters: {len(here)} are active on {target!r}; expected only one with DoRA")
    for name, each in config.adapters:
        if not config.gated_mlp and set(each.targets) == {"gate"}:
            raise UserError(f"config: adapters.{name}.targets: model.gated_mlp=False has no 'gate'; {_others('gate')}")


def _others(missing: str) -> str:
    return f"expected some of {', '.join(each for each in PROJECTIONS if each != missing)}"


def read_model(values: Mapping[str, Any]) -> ModelConfig:
    """The model config in the metadata of a checkpoint: `as_dict` of one, perhaps read from JSON. Raises UserError."""
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    kept = {name: value for name, value in values.items() if name not in ModelConfig.REMOVED}
    for name in kept:
        if name not in fields:
            raise UserError(
                f"the model's config has a field {name!r}, which this version lacks; {nearest(name, fields)}"
            )
    return ModelConfig(**kept)


def check_length(config: ModelConfig, length: int, where: str) -> None:
    """Raise UserError, starting with `where`, for windows of `length` tokens that have no learned positions."""
    if config.positions == "learned" and length > config.max_positions:
        raise UserError(f"{where}={length}: the model has learned positions for at most {config.max_positions} tokens")

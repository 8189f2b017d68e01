"""One transformer by config, decoder or encoder, used functionally.

`abstract(config)` gives a graph definition and the shapes and logical axes of the parameters; inside a loss,
`nnx.merge(graph, params)` gives the module. Layers are stacked on a leading axis and scanned, one scan for each
*segment* (a run of layers). Segments are an execution detail: the canonical tree has one stack.
"""

import functools
from collections.abc import Callable, Collection
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from llm3.config.model_schema import ModelConfig
from llm3.distributed.memory import is_in_host, layer_from_host
from llm3.distributed.sharding import gathered, pieces, residual, scattered, tree_shardings, with_sharding
from llm3.models.attention.layer import LayerInputs
from llm3.models.attention.of_layers import LayerAttention, layer_attention
from llm3.models.attention.pattern import Places
from llm3.models.blocks import Block
from llm3.models.cross_entropy import Head, blocks, cross_entropy
from llm3.models.embedding import Embedding
from llm3.models.heads import Transform, dense, pooled
from llm3.models.kernels import unembed
from llm3.models.layers import Norm, Projection, small_init
from llm3.models.low_precision import offloads_products, saves_products
from llm3.models.positions import PerLayer, angles
from llm3.segments import Segments, canonical, in_stack, segment_bounds, segment_name
from llm3.tree import flatten, unflatten

REMAT_POLICIES = {
    "full": None,
    "dots": saves_products,
    "offload": offloads_products,
}


class Transformer(nnx.Module):
    """Token ids to hidden states, and hidden states to logits of the next token or of classes."""

    def __init__(self, config: ModelConfig, segments: Segments, rngs: nnx.Rngs):
        c = self.config = config
        small = small_init(c.d_model)
        self.embed = Embedding(c, rngs)
        self.layers = nnx.Dict({segment_name(a, b): _stack(c, b - a, rngs) for a, b in segments})
        self.final_norm = Norm(c, {"embed": c.d_model}) if c.final_norm else None
        model, vocab, classes = {"embed": c.d_model}, {"vocab": c.padded_vocab_size}, {"classes": c.classes}
        untied = not c.tie_embeddings
        self.lm_head = Projection(model, vocab, init=small, bias=c.lm_head_bias, rngs=rngs) if untied else _bias(c)
        self.head = Projection(model, classes, init=small, bias=True, rngs=rngs) if c.classes else None
        self.lm_transform = Transform(c, rngs) if c.lm_transform else None
        self.pooler = dense(c, True, rngs) if c.pooler and c.classes else None

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segments: jax.Array,
        key: jax.Array | None = None,
        output_positions: jax.Array | None = None,
        prefix: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states [B, T, D] after the last norm. See `incremental.read` for a key-value cache.

        tokens, positions, segments: int32 [B, T]; see `Batch`. key: for dropout; None: no dropout. output_positions:
        int32 [B, N]; the last layer is computed at these positions only, and the result is [B, N, D]. prefix: bool
        [B, T], tokens to which all queries of their document may attend, also in a causal model.
        """
        places = Places(positions, segments)
        attention = layer_attention(self.config, places, places, prefix, in_order=True)
        rotary = angles(self.config, positions)
        x = residual(scattered(self.embed(tokens, positions)))
        for name, stack in self.layers.items():
            first, last = segment_bounds(name)
            top_positions = output_positions if last == self.config.layers else None
            x = self._scan(stack, first, x, rotary, attention, key if self._drops() else None, top_positions)
        return gathered(x if self.final_norm is None else self.final_norm(x), None)

    def _drops(self) -> bool:
        return any(each.dropout and each.active for _, each in self.config.adapters)

    def _scan(
        self,
        stack: Block,
        first: int,
        x: jax.Array,
        rotary: PerLayer,
        attention: LayerAttention,
        key: jax.Array | None,
        output_positions: jax.Array | None,
    ) -> jax.Array:
        """Apply the layers of a segment, of which the lowest is layer `first`. Other arguments as of `LayerInputs`."""
        graph, params = nnx.split(stack)
        leaves, tree = jax.tree.flatten(params)
        near = [leaf for leaf in leaves if not is_in_host(leaf)]
        length = leaves[0].shape[0]
        stop, skips = first + length, self.config.skip_first_norm and first == 0

        def body(x: jax.Array, layer: tuple, output_positions: jax.Array | None = None) -> tuple[jax.Array, None]:
            (*own, number), index = layer, layer[-1] - first
            held = [layer_from_host(x, index) if is_in_host(x) else own.pop(0) for x in leaves]
            params = jax.tree.unflatten(tree, held)
            random = None if key is None else jax.random.fold_in(key, number)
            own_angles, attend = rotary.at(number, first, stop), attention.of(number, first, stop, output_positions)
            skip_norm = number == 0 if skips else None
            inputs = LayerInputs(own_angles, attend, None, random, output_positions, skip_norm)
            x, _ = nnx.merge(graph, params)(x, inputs)
            return residual(x), None

        count = length if output_positions is None else length - 1
        unroll, top = min(self.config.scan_unroll, max(count, 1)), body
        if self.config.remat != "none":
            # without a loop between them, XLA would merge the recomputation with the forward pass and undo it
            remat = partial(jax.checkpoint, policy=REMAT_POLICIES[self.config.remat])
            body, top = remat(body, prevent_cse=unroll >= count), remat(body, prevent_cse=True)
        lower = near if output_positions is None else [leaf[:-1] for leaf in near]
        if count:
            x, _ = jax.lax.scan(body, x, (*lower, jnp.arange(first, first + count)), unroll=unroll)
        if output_positions is None:
            return x
        return top(x, (*(leaf[-1] for leaf in near), first + count), output_positions)[0]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits, float32 [B, T, padded V]; the tokens that only fill `vocab_multiple` have -1e30, as if masked.

        With `logit_softcap`, they are soft-capped as in Gemma 2 (2024, section 2).
        """
        c = self.config
        hidden = hidden if self.lm_transform is None else self.lm_transform(hidden)
        if isinstance(self.lm_head, Projection):
            y = self.lm_head(hidden, dtype=jnp.float32)
        else:
            y = unembed(hidden, self.embed.embedding[...])
            y = y if self.lm_head is None else y + self.lm_head["bias"][...]
        y = c.logit_softcap * jnp.tanh(y / c.logit_softcap) if c.logit_softcap else y
        return y if c.padded_vocab_size == c.vocab_size else jnp.where(jnp.arange(y.shape[-1]) < c.vocab_size, y, -1e30)

    def score(self, hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The cross-entropy of the targets, int32 [B, T], and whether each is the likeliest token: float32 [B, T] both.

        [B, T, V] is often the largest array of a step. A large vocabulary is computed in blocks (see `vocab_block`),
        which the backward pass computes again.
        """
        c = self.config
        if blocks(c.padded_vocab_size // pieces("vocab", c.padded_vocab_size), c.vocab_block)[0] == 1:
            logits = self.logits(hidden)
            nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
            return nats, (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
        hidden = hidden if self.lm_transform is None else self.lm_transform(hidden)
        if isinstance(self.lm_head, Projection):
            axis, kernel, bias = 1, self.lm_head.kernel, self.lm_head.bias
        else:
            axis, kernel, bias = 0, self.embed.embedding, None if self.lm_head is None else self.lm_head["bias"]
        head = Head(axis, c.vocab_size, c.vocab_block, c.logit_softcap)
        nats, likeliest = cross_entropy(head, hidden, kernel[...], None if bias is None else bias[...], targets)
        return nats, (likeliest == targets).astype(jnp.float32)

    def class_logits(self, hidden: jax.Array, segments: jax.Array) -> jax.Array:
        """Class logits of each position, float32 [B, T, C], from the task head.

        pool "last": from the hidden state at that position; callers read a document at its last token.
        pool "mean", "first": from the mean hidden state of the document or from that at its first position, the same at
        all its positions. pooler: the head reads tanh(dense(h)) (Devlin et al. 2019, BERT, reference code).
        """
        assert self.head is not None  # config.classes > 0
        x, pool = hidden.astype(jnp.float32), self.config.pool
        if self.pooler is not None:
            x = jnp.tanh(self.pooler(pooled(x, segments, "mean") if pool == "mean" else x))
            pool = "last" if pool == "mean" else pool
        return pooled(self.head(x), segments, pool)  # the head is linear, so the mean of the logits is the same


def _bias(config: ModelConfig) -> nnx.Dict | None:
    """The leaves of an LM head whose kernel is the embedding."""
    bias = nnx.Param(jnp.zeros(config.padded_vocab_size), axes=("vocab",))
    return nnx.Dict(bias=bias) if config.lm_head_bias else None


def _stack(config: ModelConfig, count: int, rngs: nnx.Rngs) -> Block:
    """`count` blocks with parameters stacked on a leading axis."""

    @nnx.split_rngs(splits=count)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs: nnx.Rngs) -> Block:
        return Block(config, rngs)

    return make(rngs)


def _streams(key: jax.Array) -> nnx.Rngs:
    return nnx.Rngs(params=key, lora=jax.random.fold_in(key, 1))


class Abstract(NamedTuple):
    """A model without values: the graph definition, and the shape and the logical axes of each leaf."""

    graph: nnx.GraphDef
    shapes: dict
    axes: dict


def abstract(config: ModelConfig, segments: Segments | None = None) -> Abstract:
    """The model cut into `segments` (default: one), without allocating arrays. Do not change the result in place."""
    return _abstract(config, segments or ((0, config.layers),))


def abstract_params(config: ModelConfig, mesh: Mesh) -> dict:
    """The shapes of the canonical parameters, with their shardings."""
    model = abstract(config)
    shapes, axes = canonical(model.shapes), canonical(model.axes)
    return with_sharding(shapes, tree_shardings(mesh, shapes, axes))


@functools.cache
def _abstract(config: ModelConfig, segments: Segments) -> Abstract:
    model = nnx.eval_shape(lambda: Transformer(config, segments, _streams(jax.random.key(0))))
    graph, state = nnx.split(model, nnx.Param)
    axes = {}
    for path, variable in nnx.to_flat_state(state):
        name = "/".join(map(str, path))
        axes[name] = (("layers",) if in_stack(name) else ()) + variable.get_metadata("axes")
    return Abstract(graph, nnx.to_pure_dict(state), unflatten(axes))


def init(config: ModelConfig, seed: int, mesh: Mesh, only: Collection[str] | None = None) -> dict:
    """Canonical float32 parameters. only: the paths of the leaves to create; their values are the same.

    They are created in place on the mesh, so that no device ever holds all of the model.
    """
    _, shapes, axes = abstract(config)
    paths = None if only is None else frozenset(only)
    shardings = _chosen(tree_shardings(mesh, shapes, axes), paths)
    return unflatten(jax.jit(_creator(config, paths), out_shardings=shardings)(jax.random.key(seed)))


def _chosen(tree: dict, only: frozenset[str] | None) -> dict:
    return {path: leaf for path, leaf in flatten(canonical(tree)).items() if only is None or path in only}


@functools.cache
def _creator(config: ModelConfig, only: frozenset[str] | None) -> Callable[[jax.Array], dict]:
    """The same function at each call, so that it is compiled once for all stages of a model."""

    def create(
        key: jax.Array,
    ) -> dict:  # the key is an argument: XLA constant-folds random numbers from a constant
        model = Transformer(config, ((0, config.layers),), _streams(key))
        return _chosen(nnx.to_pure_dict(nnx.split(model, nnx.Param)[1]), only)

    return create

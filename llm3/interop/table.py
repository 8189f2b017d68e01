"""The table of a family: how its files call each leaf, and where in a tensor the leaf lies.

A table maps a canonical module, such as "layers/attention/query", or one of its leaves to a name in the files, in which
{i} is the layer. Its kernel, scale and embedding are there as ".weight", its bias as ".bias"; kernels are [out, in] as
in torch.nn.Linear. A `Source` says where a family differs. The same table serves reading and writing.
"""

import dataclasses
import math
from collections.abc import Mapping

from llm3.config.model_schema import ModelConfig
from llm3.interop.views import Dim, View

LAYERS = "layers/"
SUFFIXES = {"kernel": ".weight", "scale": ".weight", "embedding": ".weight", "bias": ".bias"}
PROJECTIONS = ("query", "key", "value")


@dataclasses.dataclass(frozen=True)
class Source:
    """A module in the files that differs from a torch.nn.Linear of its own.

    parts: the canonical modules that are fused along the output axis, in their order; (): only this one. interleaved:
    they are fused inside each head, not one after the other. conv1d: the kernel is [in, out], as GPT-2's Conv1D.
    """

    name: str
    parts: tuple[str, ...] = ()
    interleaved: bool = False
    conv1d: bool = False


Table = Mapping[str, str | Source]


@dataclasses.dataclass(frozen=True)
class Place:
    """A leaf in the files: the name of its tensor, in which {i} is the layer, and its view in the tensor."""

    name: str
    view: View

    def named(self, layer: int) -> str:
        """The name of the tensor of one layer."""
        return self.name.replace("{i}", str(layer))


def fused(name: str, parts: tuple[str, ...], interleaved: bool = False, conv1d: bool = False) -> dict[str, Source]:
    """The entries of a module that is several canonical modules in one."""
    return dict.fromkeys(parts, Source(name, parts, interleaved, conv1d))


def source_of(table: Table, path: str) -> Source | None:
    """The entry of a canonical leaf, its name complete; None if the family has none."""
    module, _, kind = path.rpartition("/")
    if path in table:
        entry, suffix = table[path], ""
    elif module in table:
        entry, suffix = table[module], SUFFIXES[kind]
    else:
        return None
    source = entry if isinstance(entry, Source) else Source(entry)
    return dataclasses.replace(source, name=source.name + suffix)


def place_of(table: Table, path: str, shape: tuple[int, ...], model: ModelConfig) -> Place | None:
    """The place of a canonical leaf, which has `shape` in each layer; None if the family has no such leaf."""
    source = source_of(table, path)
    if source is None:
        return None
    module, _, kind = path.rpartition("/")
    axes = tuple(range(len(shape)))
    if kind == "kernel":
        count = len(shape) - 1 if module.endswith("/out") else 1  # input axes
        inputs, outputs = axes[:count], axes[count:]
        out = _output(source, module, outputs, shape, model)
        into = Dim(inputs, 0, 0, math.prod(shape[axis] for axis in inputs))
        return Place(source.name, View(shape, (into, out) if source.conv1d else (out, into)))
    if module == "embed":  # tables of embeddings, whose leaves are matrices as in the files
        return Place(source.name, View(shape, tuple(Dim((axis,), 0, 0, shape[axis]) for axis in axes)))
    return Place(source.name, View(shape, (_output(source, module, axes, shape, model),)))


def _output(source: Source, module: str, axes: tuple[int, ...], shape: tuple[int, ...], model: ModelConfig) -> Dim:
    """The output axis of a module, of which a leaf has `axes`."""
    if not source.parts:
        return Dim(axes, 0, 0, math.prod(shape[axis] for axis in axes))
    widths = [_width(part, model) for part in source.parts]
    if source.interleaved:
        widths = [width // model.heads for width in widths]
    index = source.parts.index(module)
    return Dim(axes, int(source.interleaved), sum(widths[:index]), sum(widths))


def _width(module: str, model: ModelConfig) -> int:
    """The number of outputs of a module of a layer that can be fused with others."""
    name = module.rpartition("/")[2]
    if name == "query":
        return model.heads * model.head_dim
    return model.kv_heads * model.head_dim if name in PROJECTIONS else model.d_ff


def layered(path: str) -> bool:
    """Whether a canonical leaf is stacked over layers."""
    return path.startswith(LAYERS)

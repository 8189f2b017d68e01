"""Low-rank adapters in the layout of PEFT (Mangrulkar et al. 2022), for models of every family.

Where a family fuses projections in one module, their adapters become one of the sum of their ranks, whose B has blocks:
that is the same function. Its magnitudes of DoRA are exact only if every projection of the module has the adapter.
"""

import math
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from llm3 import __version__
from llm3.config.model_schema import PROJECTIONS, AdapterConfig, ModelConfig
from llm3.errors import UserError, listed
from llm3.files import write_json
from llm3.interop.family import load_family
from llm3.interop.heads import saved_modules
from llm3.interop.names import model_places
from llm3.interop.table import Source, source_of
from llm3.interop.views import Dim, View
from llm3.tree import flatten

PREFIX = "base_model.model."


def write_adapters(
    directory: Path, params: dict, model: ModelConfig, family: str, base: str | None, head: bool, dtype: str
) -> list[str]:
    """Write adapter_config.json and adapter_model.safetensors in a folder per adapter; returns lines of a summary.

    base: the base model that they name. head: each of them has the task head as well, which PEFT puts into
    transformers' classifier. Raises UserError, before anything is written, for an adapter that PEFT cannot express.
    """
    plugin, flat = load_family(family), flatten(params)
    made = {name: (adapter, modules_of(plugin, model, name, adapter)) for name, adapter in model.adapters}
    lines = []
    for name, (adapter, modules) in made.items():
        tensors = adapter_tensors(flat, name, modules, plugin, model)
        if head:
            tensors |= head_tensors(flat, plugin, model)
        folder = directory / name
        folder.mkdir()
        tensors = {key: np.ascontiguousarray(each.astype(jnp.dtype(dtype))) for key, each in tensors.items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt", "llm3": __version__})
        write_json(folder / "adapter_config.json", adapter_json(adapter, modules, plugin, model, base, head))
        count = sum(each.size for each in tensors.values())
        lines.append(
            f"{name}/adapter_model.safetensors: {len(tensors)} tensors, {count:,} parameters, {dtype}, on "
            f"{', '.join(adapter.targets)}"
        )
    return [*lines, f"base model: {base or 'not named (--base); this stage with --format=base writes it'}"]


def modules_of(plugin: ModuleType, model: ModelConfig, name: str, adapter: AdapterConfig) -> dict[str, list[str]]:
    """{transformers' module, with {i} for the layer: canonical modules that the adapter changes, in their order}.

    Raises UserError for DoRA on some parts of a fused module.
    """
    found: dict[str, list[str]] = {}
    for target in PROJECTIONS:
        part = "attention" if target in ("query", "key", "value", "out") else "mlp"
        path = f"layers/{part}/{target}"
        if target not in adapter.targets or (target == "gate" and not model.gated_mlp):
            continue
        source = _source(plugin, path)
        found.setdefault(source.name, []).append(path)
        if adapter.dora and (lacking := set(source.parts) - {f"layers/{part}/{each}" for each in adapter.targets}):
            raise UserError(
                f"adapter {name!r}: DoRA on {target}, but not on {listed(sorted(lacking))}: transformers' "
                f"{plugin.MODEL_TYPES[0]} has them in one module; --format=merged writes the model"
            )
    return found


def _source(plugin: ModuleType, path: str) -> Source:
    """The module of the files, without the suffix of its weight."""
    source = source_of(plugin.TABLE, f"{path}/kernel")
    assert source is not None, "every family has the projections of its models"
    return Source(source.name.removesuffix(".weight"), source.parts, source.interleaved, source.conv1d)


def adapter_tensors(
    flat: dict[str, Any], name: str, modules: dict[str, list[str]], plugin: ModuleType, model: ModelConfig
) -> dict[str, np.ndarray]:
    """{PEFT's name: float32 array} of one adapter: lora_A [r, in], lora_B [out, r], lora_magnitude_vector [out]."""
    places = model_places(plugin, model)
    tensors: dict[str, np.ndarray] = {}
    for module, paths in modules.items():
        leaves = [f"{path}/lora/{name}/" for path in paths]
        factors = [
            {kind: flat[leaf + kind] for kind in ("a", "b", "magnitude") if leaf + kind in flat} for leaf in leaves
        ]
        source = _source(plugin, paths[0])
        outputs = [places[f"{path}/kernel"].view.dims[1 if source.conv1d else 0] for path in paths]
        rank = sum(each["a"].shape[-1] for each in factors)
        for layer in range(model.layers):
            key = PREFIX + module.replace("{i}", str(layer))
            parts = [{kind: leaf[layer] for kind, leaf in each.items()} for each in factors]
            tensors[f"{key}.lora_A.weight"] = np.concatenate([_flat_inputs(each["a"]).T for each in parts])
            tensors[f"{key}.lora_B.weight"] = _blocks([each["b"] for each in parts], outputs, rank)
            if "magnitude" in parts[0]:
                tensors[f"{key}.lora_magnitude_vector"] = _magnitudes([each["magnitude"] for each in parts], outputs)
    return tensors


def _flat_inputs(a: Any) -> np.ndarray:
    return np.asarray(a, np.float32).reshape(-1, a.shape[-1])


def _blocks(factors: list[Any], outputs: list[Dim], rank: int) -> np.ndarray:
    """B [out, rank] of a module from those of its parts, [r, *outputs] each: one block each, zero elsewhere."""
    whole, start = None, 0
    for b, out in zip(factors, outputs, strict=True):
        view = View(b.shape, (_first_axis(out, len(b.shape) - 1, 1), Dim((0,), 0, start, rank)))
        whole = np.zeros(view.tensor_shape, np.float32) if whole is None else whole
        view.write(whole, np.asarray(b, np.float32))
        start += b.shape[0]
    assert whole is not None
    return whole


def _magnitudes(vectors: list[Any], outputs: list[Dim]) -> np.ndarray:
    whole = None
    for vector, out in zip(vectors, outputs, strict=True):
        view = View(vector.shape, (_first_axis(out, len(vector.shape), 0),))
        whole = np.zeros(view.tensor_shape, np.float32) if whole is None else whole
        view.write(whole, np.asarray(vector, np.float32))
    assert whole is not None
    return whole


def _first_axis(out: Dim, count: int, first: int) -> Dim:
    """The output axis of a kernel, for an array whose output axes are `count` from `first` on."""
    return Dim(tuple(range(first, first + count)), out.outer, out.start, out.total)


def head_tensors(flat: dict[str, Any], plugin: ModuleType, model: ModelConfig) -> dict[str, np.ndarray]:
    """{PEFT's name: float32 array} of the task head, of which LlamaForSequenceClassification has no bias."""
    places = model_places(plugin, model)
    tensors = {}
    for path in (each for each in flat if each.startswith(("head/", "pooler/"))):
        if (place := places[path]).name != "score.bias":
            tensor = np.empty(place.view.tensor_shape, np.float32)
            place.view.write(tensor, np.asarray(flat[path], np.float32))
            tensors[PREFIX + place.name] = tensor
    return tensors


def adapter_json(
    adapter: AdapterConfig,
    modules: dict[str, list[str]],
    plugin: ModuleType,
    model: ModelConfig,
    base: str | None,
    head: bool,
) -> dict[str, Any]:
    """PEFT's adapter_config.json."""
    counts = {module: len(paths) for module, paths in modules.items()}
    several = {_suffix(module): count for module, count in counts.items() if count > 1}
    grown = (lambda count: math.sqrt(count)) if adapter.rslora else float  # so that the scale stays the same
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if head else "CAUSAL_LM" if model.causal else None,
        "modules_to_save": saved_modules(plugin, model) if head else None,
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "rank_pattern": {suffix: adapter.rank * count for suffix, count in several.items()},
        "alpha_pattern": {suffix: adapter.alpha * grown(count) for suffix, count in several.items()},
        "use_rslora": adapter.rslora,
        "use_dora": adapter.dora,
        "lora_dropout": adapter.dropout,
        "target_modules": target_modules(list(modules), plugin),
        "fan_in_fan_out": any(_source(plugin, paths[0]).conv1d for paths in modules.values()),
        "bias": "none",
        "inference_mode": True,
    }


def _suffix(module: str) -> str:
    """What tells a module from the others of its layer, as a pattern of PEFT: its name inside the layer."""
    return re.escape(module.partition("{i}.")[2])


def target_modules(modules: list[str], plugin: ModuleType) -> list[str] | str:
    """The last words of the modules where only they end so, else a pattern of their whole names."""
    everything = {entry.name if isinstance(entry, Source) else entry for entry in plugin.TABLE.values()}
    words = [module.rpartition(".")[2] for module in modules]
    if all(sum(each.rpartition(".")[2] == word for each in everything) == 1 for word in words):
        return sorted(words)
    before = re.escape(modules[0].partition("{i}.")[0].removeprefix(plugin.BASE))
    return rf"(.*\.)?{before}\d+\.({'|'.join(sorted(map(_suffix, modules)))})"

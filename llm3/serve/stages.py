"""The stages of runs in memory. Equal leaves are held once; stages that differ by adapters only share one model."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from llm3.checkpoints.load import load_stage, trained_stages
from llm3.config.model_schema import ModelConfig
from llm3.errors import UserError, nearest
from llm3.models.lora import merged
from llm3.predict.trained import Trained, open_trained
from llm3.segments import Segments, segmented
from llm3.tree import flatten, leaf_digests, unflatten

CAST = ("kernel", "embedding")  # leaves that the model rounds to the compute dtype before it uses them


class Shared(NamedTuple):
    """A model that several stages decode with at once. variants: the adapters of each of them, see `Shape`.

    leaves: of the model cut into `segments`, one for each layer, whose kernels are then read in place.
    """

    config: ModelConfig
    leaves: dict
    segments: Segments
    variants: tuple[tuple[str, ...], ...]


class Served(NamedTuple):
    """A stage that can be asked. name: unique among all runs.

    leaves: of its own model, cut like those of `shared`, the model that it decodes with, as its variant `variant`.
    """

    name: str
    trained: Trained
    model: ModelConfig
    leaves: dict
    shared: Shared
    variant: int

    @property
    def generates(self) -> bool:
        """Whether it can continue a text."""
        return self.model.causal and self.trained.lm_head


class _Opened(NamedTuple):
    trained: Trained
    model: ModelConfig
    leaves: dict[str, Any]  # by path


def open_stages(workdirs: Sequence[Path], only: Sequence[str] = ()) -> dict[str, Served]:
    """{name: stage} of each trained stage of each run, parents first. only: the names of the stages; (): all.

    With several runs, a name is RUN/STAGE, where RUN is the name of the folder. Raises UserError.
    """
    if len({each.resolve().name for each in workdirs}) < len(workdirs):
        raise UserError("--workdir: the folders of two runs have the same name: expected different names")
    places: dict[str, tuple[Path, str]] = {}
    for workdir in workdirs:
        prefix = f"{workdir.resolve().name}/" if len(workdirs) > 1 else ""
        places |= {f"{prefix}{stage}": (workdir, stage) for stage in trained_stages(workdir)}
    for name in only:
        if name not in places:
            raise UserError(f"--stage={name}: {nearest(name, places)}")
    known: dict[str, Any] = {}
    stages = {name: _opened(*places[name], known) for name in places if not only or name in only}
    groups: dict[Any, list[str]] = {}
    for name, each in stages.items():
        ids = tuple(id(leaf) for path, leaf in each.leaves.items() if _is_base(path))
        groups.setdefault((_base(each.model), ids), []).append(name)
    served = {}
    for members in groups.values():
        shared = _shared([stages[name] for name in members])
        for variant, name in enumerate(members):
            trained, model, leaves = stages[name]
            served[name] = Served(name, trained, model, unflatten(leaves), shared, variant)
    return {name: served[name] for name in stages}


def _opened(workdir: Path, stage: str, known: dict[str, Any]) -> _Opened:
    """A stage with its parameters on the device. known: {digest: leaf} of all stages so far."""
    trained = open_trained(workdir, stage)
    params, model, _ = load_stage(workdir, stage, str(trained.meta["step"]))
    if any(each.dora and each.active for _, each in model.adapters):  # its gain depends on the kernel too
        params, model = merged(params, model.adapters), dataclasses.replace(model, adapters=())
    leaves = {}
    for path, leaf in flatten(segmented(params, _cut(model))).items():
        array = np.asarray(leaf)
        if path.rpartition("/")[2] in CAST:
            array = array.astype(model.compute_dtype)
        digest = leaf_digests({"": array})[""]
        if digest not in known:
            known[digest] = jnp.asarray(array)
        leaves[path] = known[digest]
    return _Opened(trained, model, leaves)


def _cut(model: ModelConfig) -> Segments:
    return tuple((layer, layer + 1) for layer in range(model.layers))


def _base(model: ModelConfig) -> ModelConfig:
    """The model without what stages of one base differ by."""
    pool = "last" if model.causal else "mean"
    own = {"adapters": (), "classes": 0, "pool": pool, "pooler": False, "max_output_positions": 0}
    return dataclasses.replace(model, **own, remat="none", vocab_block=0)  # type: ignore[arg-type]


def _is_base(path: str) -> bool:
    return "/lora/" not in path and path.split("/")[0] not in ("head", "pooler")


def _shared(members: Sequence[_Opened]) -> Shared:
    """The base of all members, with the active adapters of each under names of their own."""
    leaves = {path: leaf for path, leaf in members[0].leaves.items() if _is_base(path)}
    adapters, variants = [], []
    for number, (_, model, own) in enumerate(members):
        active = {name: each for name, each in model.adapters if each.active}
        adapters += [(f"{number}_{name}", each) for name, each in active.items()]
        variants.append(tuple(f"{number}_{name}" for name in active))
        for path, leaf in own.items():
            projection, in_adapter, rest = path.partition("/lora/")
            name, _, last = rest.partition("/")
            if in_adapter and name in active:
                leaves[f"{projection}/lora/{number}_{name}/{last}"] = leaf
    base = _base(members[0].model)
    return Shared(dataclasses.replace(base, adapters=tuple(adapters)), unflatten(leaves), _cut(base), tuple(variants))

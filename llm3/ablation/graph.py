"""The graph of stage runs behind an ablation: what variants and seeds have in common is trained once."""

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llm3 import config_folder
from llm3.ablation.arms import chain_config, seeded
from llm3.ablation.costs import Cost, Priced
from llm3.ablation.schema import AblationConfig
from llm3.config.load import FOLDER
from llm3.config.schema import RunConfig, StageConfig
from llm3.data.chat_templates import template_hash
from llm3.data.library import Library
from llm3.files import INIT, ROW, TOKENIZER, read_json, write_json
from llm3.handoff.checkpoint import find_checkpoint
from llm3.handoff.pretrained import find_pretrained
from llm3.handoff.start import ModelStart, Start, read_start
from llm3.stages.evaluated import Entries, definition
from llm3.stages.experiment import read_evaluation_data
from llm3.stages.later import outdated
from llm3.stages.parents import parent_name
from llm3.stages.rules import data_sources
from llm3.stages.workdir import judge, stage_record

RUNS = "runs"  # the folder of the stage runs
NODE = "node.json"  # in the folder of a stage run: its config


class Node(NamedTuple):
    """A stage run, in a run directory of its own. name: STAGE-DIGEST; parent: the name of another node, or "".

    config: the fields of a run with this stage alone; `start.run` is filled in when it is written. uses: the variants
    and seeds that it is a part of. key: equal for equal programs. evaluations: those that its row must have.
    """

    name: str
    stage: str
    parent: str
    config: dict[str, Any]
    cost: Cost
    key: str
    uses: list[tuple[str, int]]
    evaluations: Entries


class Graph(NamedTuple):
    """All stage runs, parents first, and those of each variant and seed, the first one first."""

    nodes: dict[str, Node]
    chains: dict[tuple[str, int], list[str]]


def build(priced: list[Priced], config: AblationConfig) -> Graph:
    """The stage runs of all variants and seeds; those of the first seed come first."""
    nodes: dict[str, Node] = {}
    chains: dict[tuple[str, int], list[str]] = {}
    evaluations = {each.variant.name: _entries(each) for each in priced}
    for seed in config.seeds:
        for each in priced:
            key = each.variant.name, seed
            chains[key] = []
            for node in _chain(each, seed, config, evaluations[each.variant.name]):
                nodes.setdefault(node.name, node).uses.append(key)
                chains[key].append(node.name)
    return Graph(nodes, chains)


def _entries(priced: Priced) -> Entries:
    """The evaluations of a variant, as its rows keep them."""
    config, data = priced.config, read_evaluation_data(priced.config, priced.library)
    return {name: {"config": definition(config, name), "data": data.get(name, "")} for name in config.evaluations}


def _chain(priced: Priced, seed: int, config: AblationConfig, evaluations: Entries) -> Iterator[Node]:
    values = seeded(priced.variant.values, seed, config.vary)
    full, parent = chain_config(values, priced.variant.stage), ""
    for name in priced.chain:
        digest = node_digest(full, name, parent, priced.library)
        own = copy.deepcopy({key: value for key, value in values.items() if key != "stages"})
        own["stages"] = {name: _started(values["stages"][name], parent)}
        cost = priced.costs[name]
        node = Node(f"{name}-{digest}", name, parent, own, cost.total, cost.key, [], evaluations)
        yield node
        parent = node.name


def _started(stage: Mapping[str, Any], parent: str) -> dict[str, Any]:
    """The fields of a stage that starts from another stage run."""
    own = copy.deepcopy(dict(stage))
    if parent:
        rules = own["start"] if isinstance(own["start"], dict) else {}
        own["start"] = rules | {"run": parent, "stage": parent.rpartition("-")[0]}
    return own


def node_digest(config: RunConfig, name: str, parent: str, library: Library) -> str:
    """A digest of what decides the result of a stage: its config, its parent, its data by content, and its tokenizer.

    The places of data, parents and tokenizers have no part in it. If another stage of the config starts from a certain
    step of this one, so has what decides which steps are kept.
    """
    record = stage_record(config, name)
    start = read_start(config.stages[name].start, Path(), f"config.stages.{name}.start")
    rules = {} if start is None else {"fresh": start.fresh, "drop": start.drop, "step": getattr(start, "step", "")}
    own = {key: value for key, value in record["stage"].items() if key != "start"} | _kept(config, name)
    decides = {
        "stage": own | rules,
        "model": record["model"],
        "seed": record["seed"],
        "parent": parent or _origin(start, name),
        "data": {source: library.cache(source, "train").fingerprint for source in data_sources(config, name)},
        "judge": record.get("evaluations"),
        "tokenizer": [library.tokenizer.hash, template_hash(library.template) if library.template else ""],
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:10]


def _kept(config: RunConfig, name: str) -> dict[str, Any]:
    """The fields that decide which steps of a stage are kept, and which one is the best, if a stage starts from one."""
    starts = [each.start for each in config.stages.values() if parent_name(each) == name]
    if all(not isinstance(each, dict) or each.get("step", "latest") == "latest" for each in starts):
        return {}
    stage = config.stages[name]
    judges = {key: definition(config, key) for key in [judge(stage.best, config)] if key}
    return {key: getattr(stage, key) for key in sorted(StageConfig.VALIDATION | {"save_every", "keep"})} | {
        "judge": judges
    }


def _origin(start: Any, name: str) -> str:
    """The digest of what the first stage of a chain starts from; "" for the untrained model."""
    where = f"config.stages.{name}.start"
    if isinstance(start, ModelStart):
        return find_pretrained(start, Path(), where).digest()
    if isinstance(start, Start) and start.stage != INIT:
        return find_checkpoint(start, where).meta["params_digest"]
    return ""


def directory(workdir: Path, name: str) -> Path:
    """The run directory of a stage run."""
    return workdir / RUNS / name


def row_of(workdir: Path, node: Node) -> dict[str, Any] | None:
    """The row of a stage run; None if it is not finished, or if an evaluation has changed since."""
    folder = directory(workdir, node.name)
    return None if outdated(folder, [node.stage], node.evaluations) else read_json(folder / node.stage / ROW)


def write_node(workdir: Path, node: Node, library: Library) -> Path:
    """Write the config and the tokenizer of a stage run; returns its run directory."""
    workdir = workdir.resolve()
    folder, values = directory(workdir, node.name), copy.deepcopy(node.config) | {FOLDER: config_folder.current()}
    if node.parent:
        values["stages"][node.stage]["start"]["run"] = str(directory(workdir, node.parent))
    write_json(folder / NODE, values)
    if not (folder / TOKENIZER).is_file():
        library.tokenizer.save(folder / TOKENIZER)
    return folder

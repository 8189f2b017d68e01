"""Whether a run has the results of another, bit for bit: parameters, optimizers, metrics, rows, and what is kept."""

import json
import re
from pathlib import Path
from typing import Any

from tests.campaigns.kill_points import STAGES, STEPS

# Times, rates and memory
MEASURED = re.compile(r"\w*seconds|\w*_per_second|mfu|hfu|data_wait|peak_bytes|temp_bytes|meta_digest|cache_dir")


def differences(directory: Path, reference: Path) -> dict[str, str]:
    """{path of a file or a checkpoint: what of it differs from the reference} of two folders of finished runs."""
    found = {}
    for stage in STAGES:
        found |= _checkpoints(directory, reference, stage)
    for stage in ("init", *STAGES):
        names = ["evaluation.json", "details.json", "config.json", "data_sample.json"]
        found |= {f"{stage}/{name}": _of_json(directory, reference, f"{stage}/{name}") for name in names}
        for name in ("metrics.jsonl", "samples.jsonl"):
            found[f"{stage}/{name}"] = _of_lines(directory, reference, f"{stage}/{name}")
    found |= {name: _of_json(directory, reference, name) for name in ("matrix.json", "config.resolved.json")}
    exact = [Path("tokenizer.json")]
    for pattern in ("*/predictions/*.parquet", "cache/tokens-*/**/*", "cache/tokenizer-*.json"):
        exact += [path.relative_to(reference) for path in sorted(reference.glob(pattern)) if path.is_file()]
    for name in exact:
        if name.name != "source.json":  # where it was made
            same = (directory / name).is_file() and (directory / name).read_bytes() == (reference / name).read_bytes()
            found[str(name)] = "" if same else "other bytes"
    found |= {str(path.relative_to(directory)): "left behind" for path in _unfinished(directory)}
    return {name: text for name, text in found.items() if text}


def _unfinished(directory: Path) -> list[Path]:
    """What a killed process has left half-written, but for the entries of the cache that are removed in a day."""
    return [path for path in directory.rglob("*") if "-tmp" in path.name and "cache" not in path.parts]


def newest(directory: Path, stage: str) -> Any:
    """The newest intact checkpoint of a stage (`stage_checkpoints.Restored`), as numpy arrays; its digests hold."""
    import jax

    from llm3.checkpoints.metadata import saved_shapes
    from llm3.checkpoints.stage_checkpoints import Checkpoints, Wanted

    checkpoints = Checkpoints(directory / stage / "checkpoints", read_only=True)

    def wanted(step: int) -> Wanted:
        shapes = saved_shapes(checkpoints.meta(step), "opt")
        return Wanted(None, {path: jax.ShapeDtypeStruct(*shape) for path, shape in shapes.items()})

    return checkpoints.load_newest(wanted)


def _checkpoints(directory: Path, reference: Path, stage: str) -> dict[str, str]:
    from llm3.checkpoints.metadata import by_path
    from llm3.errors import UserError

    name = f"{stage}/checkpoints/{STEPS}"
    try:
        own, other = newest(directory, stage), newest(reference, stage)
    except UserError as error:
        return {name: str(error)}
    if own is None or own.step != STEPS:
        return {name: "missing, or damaged" if own is None else "; ".join(own.skipped) or "missing"}
    leaves = [by_path({"params": each.params, "opt": each.opt}) for each in (own, other)]
    apart = [path for path in leaves[0].keys() | leaves[1].keys() if not _same_bytes(path, *leaves)]
    meta = _apart(own.meta, other.meta)
    steps = [
        {path.name for path in (each / stage / "checkpoints").iterdir() if path.name.isdecimal()}
        for each in (directory, reference)
    ]
    lost = [f"step {step} is lost" for step in sorted(steps[1] - steps[0])]
    return {name: "; ".join([*(f"other bits: {path}" for path in apart), *meta, *lost])}


def _same_bytes(path: str, own: dict, other: dict) -> bool:
    return path in own and path in other and own[path].tobytes() == other[path].tobytes()


def _of_json(directory: Path, reference: Path, name: str) -> str:
    return "; ".join(_apart(_read(directory / name), _read(reference / name)))


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return "no JSON"


def _of_lines(directory: Path, reference: Path, name: str) -> str:
    own, other = (_lines(each / name) for each in (directory, reference))
    if own == other:
        return ""
    steps = [line["step"] for line in other if line not in own]
    return f"{len(own)} lines, expected {len(other)}; lacks, or has otherwise, those of steps {steps}"


def _lines(path: Path) -> list[Any]:
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    found = []
    for line in lines:
        try:
            found.append(_without_measured(json.loads(line)))
        except ValueError:
            found.append("no JSON")
    return found


def _without_measured(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_measured(each) for key, each in value.items() if not MEASURED.fullmatch(key)}
    return [_without_measured(each) for each in value] if isinstance(value, list) else value


def _apart(own: Any, other: Any, where: str = "") -> list[str]:
    """The fields in which two JSON values differ, those that are measured left out."""
    if isinstance(own, dict) and isinstance(other, dict):
        keys = sorted(key for key in own.keys() | other.keys() if not MEASURED.fullmatch(key))
        return [line for key in keys for line in _apart(own.get(key), other.get(key), f"{where}.{key}".strip("."))]
    own, other = _without_measured(own), _without_measured(other)
    return [] if own == other else [f"{where}: {str(own)[:60]}, expected {str(other)[:60]}"]

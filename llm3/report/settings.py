"""The fields of a config that are not at their defaults, as lines."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from llm3.files import RESOLVED
from llm3.report.escape import block
from llm3.report.material import Material


def section(material: Material) -> list[str]:
    """The settings of the run; empty if they are not known."""
    if not material.settings:
        return []
    lines = "\n".join(_indented(material.settings))
    return [
        "## Config",
        f"[{RESOLVED}]({RESOLVED}) has every field. These are not at their defaults:",
        block(lines),
    ]


def _indented(settings: list[str]) -> Iterator[str]:
    """The lines of an entry of sources, stages or evaluations below its name."""
    entry = ""
    for line in settings:
        found = re.match(r"((?:sources|stages|evaluations)\.(?:\{.*?\}|[^.]+))\.", line)
        if found and found[1] != entry:
            yield found[1]
        entry = found[1] if found else ""
        yield f"  {line.removeprefix(f'{entry}.')}" if entry else line


def changed(config: Any) -> list[str]:
    """Lines "field = value" of a dataclass with sections; stages that differ only in their seeds share their lines."""
    lines: list[str] = []
    for field, value in _fields(config):
        if field.name == "stages":
            lines += _replicates_joined({name: _section(f"stages.{name}", each) for name, each in value.items()})
        else:
            lines += _value(field.name, value, field)
    return lines


def _fields(section: Any) -> list[tuple[dataclasses.Field, Any]]:
    return [(field, getattr(section, field.name)) for field in dataclasses.fields(section)]


def _section(where: str, section: Any) -> list[str]:
    return [line for field, value in _fields(section) for line in _value(f"{where}.{field.name}", value, field)]


def _value(where: str, value: Any, field: dataclasses.Field) -> list[str]:
    """The lines of a field: none if it is at its default."""
    if dataclasses.is_dataclass(value):
        return _section(where, value)
    if isinstance(value, dict) and value and all(dataclasses.is_dataclass(each) for each in value.values()):
        return [line for name, each in value.items() for line in _section(f"{where}.{name}", each)]
    default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    return [] if value == default else [f"{where} = {value!r}"]


def _replicates_joined(stages: dict[str, list[str]]) -> list[str]:
    """The lines of all stages; those of stages with equal lines but for the seed once, under all their names."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, lines in stages.items():
        own = [line.removeprefix(f"stages.{name}.") for line in lines]
        groups.setdefault(tuple(line for line in own if not line.startswith("seed = ")), []).append(name)
    joined = []
    for shared, names in groups.items():
        label = f"stages.{names[0]}" if len(names) == 1 else f"stages.{{{','.join(names)}}}"
        joined += [f"{label}.{line}" for line in shared]
        seeds = [line.partition(".seed = ")[2] for name in names for line in stages[name] if _is_seed(line, name)]
        joined += [f"{label}.seed = {', '.join(seeds)}"] * bool(seeds)
    return joined


def _is_seed(line: str, name: str) -> bool:
    return re.match(rf"stages\.{re.escape(name)}\.seed = ", line) is not None

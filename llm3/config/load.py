"""Reads config files and command-line overrides, and checks them against `llm3.config.schema`.

A config file is Python: `get_config()` returns an `ml_collections.ConfigDict` with the fields of `RunConfig`.
"""

import ast
import dataclasses
import re
import runpy
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llm3 import config_folder
from llm3.config.schema import RunConfig
from llm3.errors import SYNONYMS, UserError, known_as, nearest
from llm3.files import local_path, read_json

ORDERED = ("sources", "stages", "evaluations")  # sections whose entries run and are shown in the order of the file
FOLDER = "config_folder"  # a key of a config in a JSON file
Config = typing.TypeVar("Config")


def load(file: str, overrides: Iterable[str] = ()) -> RunConfig:
    """The config of `file` ("path.py" or "path.py:argument"), with overrides of the form "stages.finetune.steps=50".

    Raises UserError for a file that does not load, an unknown field (with the nearest valid names), a missing field, or
    a wrong type.
    """
    return read(values(file, overrides))


def values(file: str, overrides: Iterable[str] = (), kind: Any = RunConfig) -> dict[str, Any]:
    """The fields that `file` and the overrides give a config of this kind, not yet read. Raises UserError as `load`."""
    given = _run_file(file)
    if kind is RunConfig and "base" in given and "stages" not in given:
        raise UserError(f"--config={file}: the config of an ablation, which `ablate` trains")
    override(kind, given, overrides)
    return given


def override(kind: Any, given: dict[str, Any], overrides: Iterable[str]) -> None:
    """Set fields of a config of this kind by texts such as "stages.finetune.steps=50". Raises UserError as `load`."""
    for each in overrides:
        name, equals, text = each.partition("=")
        if not equals:
            raise UserError(f"--config.{each}: expected --config.FIELD=VALUE")
        assign(kind, given, name, _literal(text), "config")


def assign(kind: Any, given: dict[str, Any], field: str, value: Any, where: str) -> None:
    """Set one field of a config of this kind by its dotted name. Raises UserError, starting with `where`."""
    _assign(kind, given, field.split("."), value, where)


def read(given: dict[str, Any]) -> RunConfig:
    """The config of the fields that `values` returned. Raises UserError as `load`."""
    return read_as(RunConfig, given)


def read_as(kind: type[Config], given: dict[str, Any]) -> Config:
    """The config of this kind of the fields that `values` returned for it. Raises UserError as `load`."""
    return _read(kind, given, "config")


def check_section(kind: Any, given: Any, where: str) -> None:
    """Raise UserError for fields of a section that it does not have or that have a wrong type; some may be missing."""
    if not isinstance(given, dict):
        raise UserError(f"{where}={given!r}: expected a section with fields, got {type(given).__name__}")
    hints = typing.get_type_hints(kind)
    for name, value in given.items():
        if name not in hints:
            raise UserError(f"{where}.{name}: no such field; {right_place(kind, name)}")
        _read(hints[name], value, f"{where}.{name}")


NOT_GIVEN = [("model", name) for name in ("vocab_size", "classes", "adapters", "max_output_positions")]  # they follow


def right_place(kind: Any, name: str) -> str:
    """The end of an error for a field that a section lacks: the place of a field of this name, or the nearest ones."""
    hints = typing.get_type_hints(kind)
    if inner := [f"{path}.{name}" for path, fields in _sections(kind) if path and name in fields]:
        return f"did you mean {inner[0]!r}? valid: {', '.join(sorted(hints))}"
    names = [name, *(each for each in SYNONYMS.get(name, ()) if "." not in each)]
    found = [(path, each) for path, fields in _sections(RunConfig) for each in names if each in fields]
    places = [f"config.{path}.{each}" for path, each in found if path and (path, each) not in NOT_GIVEN]
    if places and not known_as(name, hints):
        return f"did you mean {' or '.join(places[:2])}? valid: {', '.join(sorted(hints))}"
    return nearest(name, hints)


def _sections(kind: Any, path: str = "") -> Iterator[tuple[str, list[str]]]:
    """(dotted path, fields) of a section and of those below it; a section by name has NAME in its path."""
    hints = typing.get_type_hints(kind)
    yield path, list(hints)
    for name, each in hints.items():
        named = typing.get_origin(each) is dict
        for inner in typing.get_args(each) or (each,):
            if dataclasses.is_dataclass(inner):
                yield from _sections(inner, f"{path}.{name}".lstrip(".") + ".NAME" * named)


def _run_file(file: str) -> dict:
    if re.match(r"[A-Za-z][\w+.-]+://", file):
        local_path(file, "--config")  # raises
    name, _, argument = file.partition(":")
    path = local_path(name, "--config")
    if not path.is_file():
        siblings = sorted(str(each) for each in path.parent.glob("*.py")) if path.parent.is_dir() else []
        raise UserError(f"--config={name}: no such file; {nearest(name, siblings)}")
    if path.suffix == ".json":
        return _read_file(path, name)
    config_folder.enter(path.parent)
    try:
        with config_folder.on_path():
            get_config = runpy.run_path(str(path)).get("get_config")
            config: Any = get_config and (get_config(argument) if argument else get_config())
    except Exception as error:
        plain = "; ConfigDict(convert_dict=False) keeps dicts as they are" * ("allow_dotted_keys" in str(error))
        raise UserError(f"--config={name}: {type(error).__name__}: {error}{plain}") from error
    if get_config is None:
        raise UserError(f"--config={name}: the file defines no get_config()")
    if not hasattr(config, "to_dict"):
        raise UserError(f"--config={name}: get_config() returned {type(config).__name__}, expected a ConfigDict")
    return _copied(_in_given_order(config))


def _read_file(path: Path, name: str) -> dict:
    """The fields in a JSON file, such as the one with every field that `run` keeps.

    `FOLDER` is no field: it names the folder of the config that the fields come from, where its functions are.
    """
    given = read_json(path)
    if not isinstance(given, dict):
        raise UserError(f"--config={name}: holds {type(given).__name__}, expected the fields of a config")
    config_folder.enter(given.pop(FOLDER, path.parent))
    return given


def _in_given_order(config: Any) -> dict:
    """The values of a ConfigDict, which sorts its keys, with the entries of `ORDERED` sections as the file gives them.

    All else stays sorted, so that results do not depend on the order in which a file sets fields.
    """
    values = config.to_dict()
    for section in ORDERED:
        entries = getattr(config.get(section), "_fields", None)  # no public method keeps the order
        if entries is not None:
            values[section] = {name: values[section][name] for name in entries}
    return values


def _copied(value: Any) -> Any:
    """A deep copy without shared objects, so that an override changes one field only."""
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    return [_copied(each) for each in value] if isinstance(value, list | tuple) else value


def _literal(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        return text


def _assign(kind: Any, values: dict, parts: list[str], value: Any, where: str) -> None:
    """Set one field by its dotted name; the schema `kind` has the valid names."""
    name, rest = parts[0], parts[1:]
    if dataclasses.is_dataclass(kind):
        fields = typing.get_type_hints(kind)
        if name not in fields:
            raise UserError(f"{where}.{name}: no such field; {right_place(kind, name)}")
        inner = fields[name]
    else:
        inner = typing.get_args(kind)[1] if typing.get_origin(kind) is dict else Any
        is_new = not rest and isinstance(value, dict)  # a new entry with its fields
        if dataclasses.is_dataclass(inner) and name not in values and not is_new:
            raise UserError(f"{where}.{name}: no such entry; {nearest(name, values)}")
    if not rest:
        values[name] = value
        return
    if not isinstance(values.setdefault(name, {}), dict):
        raise UserError(f"{where}.{name} is {values[name]!r} and has no field {rest[0]!r}")
    _assign(inner, values[name], rest, value, f"{where}.{name}")


def _read(kind: Any, value: Any, where: str) -> Any:
    """`value` as a `kind`: a dataclass, dict[str, X], list[X], tuple[X, ...], union or plain type. Raises UserError."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _read_section(kind, value, where)
    if origin in (types.UnionType, typing.Union):
        options = [each for each in args if each is not types.NoneType]
        return None if value is None else _read(options[0], value, where)
    if origin is dict and isinstance(value, dict):
        return {key: _read(args[1], each, f"{where}.{key}") for key, each in value.items()}
    if origin in (list, tuple) and isinstance(value, list | tuple):
        return origin(_read(args[0], each, f"{where}[{i}]") for i, each in enumerate(value))
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind in (int, str, bool) and type(value) is kind:
        return value
    expected = getattr(kind, "__name__", str(kind)) if origin is None else str(kind)
    raise UserError(f"{where}={value!r}: expected {expected}, got {type(value).__name__}")


def _read_section(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"{where}={value!r}: expected a section with fields, got {type(value).__name__}")
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in value:
        if name not in fields:
            raise UserError(f"{where}.{name}: no such field; {right_place(kind, name)}")
    missing = [
        name
        for name, field in fields.items()
        if name not in value and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"{where}: missing {', '.join(missing)}")
    read = {name: _read(hints[name], each, f"{where}.{name}") for name, each in value.items()}
    try:
        return kind(**read)
    except UserError as error:
        raise UserError(
            re.sub(r"^config: (\w+\.\*)?", lambda found: where if found[1] else "config.", str(error))
        ) from None

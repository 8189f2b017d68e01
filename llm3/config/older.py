"""Configs that an older version saved: they lack the fields that have come since, and have some that are gone."""

import dataclasses
import json
import typing
from typing import Any


def with_new_fields(saved: Any, now: Any, kind: Any) -> Any:
    """A saved section, with those of the fields it lacks that have their default in `now`.

    So a field that has come since the section was saved is a difference only if it is set, and a field in `REMOVED` is
    none. saved, now: JSON values. kind: their type, a dataclass of a config, dict[str, X], {name: X} or X | None;
    sections of other types stay.
    """
    if not (isinstance(saved, dict) and isinstance(now, dict)):
        return saved
    kinds, removed = section_kinds(kind, now), getattr(kind, "REMOVED", ())
    kept = {key: value for key, value in saved.items() if key not in removed}
    filled = {key: with_new_fields(value, now.get(key), kinds.get(key)) for key, value in kept.items()}
    for field in dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ():
        if field.name in now and field.name not in saved and _is_default(now[field.name], field, kinds[field.name]):
            filled[field.name] = now[field.name]
    return filled


def section_kinds(kind: Any, names: typing.Iterable[str]) -> dict[str, Any]:
    """{name: type} of the values of a section."""
    if isinstance(kind, dict):
        return kind
    if dataclasses.is_dataclass(kind):
        return {name: _section(each) for name, each in typing.get_type_hints(kind).items()}
    if typing.get_origin(kind) is dict:
        return dict.fromkeys(names, _section(typing.get_args(kind)[1]))
    return {}


def _section(kind: Any) -> Any:
    """X of a type X | None where X is a dataclass, else the type itself."""
    if typing.get_origin(kind) is dict:
        return kind
    return next((each for each in typing.get_args(kind) if dataclasses.is_dataclass(each)), kind)


def _is_default(value: Any, field: dataclasses.Field, kind: Any) -> bool:
    if field.default is not dataclasses.MISSING:
        return value == json.loads(json.dumps(field.default))
    if field.default_factory is dataclasses.MISSING:
        return False
    if dataclasses.is_dataclass(kind):  # also where a record leaves out some of its fields
        return with_new_fields({}, value, kind) == value
    return value == json.loads(json.dumps(field.default_factory()))

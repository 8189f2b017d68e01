"""Which fields of a config may change while a run goes on, and how two records of a config differ.

Each dataclass of the schema names its fields that may change, beside them. `FREE` fields do not change what is learned:
logs, checkpoints, what is measured, and how the same step is computed. `AMENDABLE` fields do, and can change at the
step where a run resumes (`run --amend`). All others are fixed: what they describe would be another stage.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from llm3.config.older import section_kinds

Class = Literal["free", "amendable", "fixed"]


class Change(NamedTuple):
    """A field that differs, by its dotted name, with its JSON values; None where there is none."""

    field: str
    saved: Any
    now: Any
    kind: Class

    @property
    def line(self) -> str:
        """The change on one line."""
        return f"{self.field}: saved {self.saved!r}, now {self.now!r}"


def field_class(section: Any, name: str, outer: Class = "fixed") -> Class:
    """Whether a field of a section, a dataclass or another type, may change. outer: the class of the section itself."""
    if name in getattr(section, "FREE", ()):
        return "free"
    return "amendable" if name in getattr(section, "AMENDABLE", ()) else outer


def changes(saved: Any, now: Any, kind: Any, where: str = "", own: Class = "fixed") -> Iterator[Change]:
    """The fields in which two JSON values of a type differ.

    kind: as in `with_new_fields`. where, own: the dotted name and the class of the values. An amendable field is one
    change, whatever differs within it.
    """
    whole = own == "amendable" and not dataclasses.is_dataclass(kind)
    if whole or not (isinstance(saved, dict) and isinstance(now, dict)):
        if saved != now:
            yield Change(where, saved, now, own)
        return
    names = sorted(saved.keys() | now.keys())
    kinds = section_kinds(kind, names)
    for name in names:
        path = f"{where}.{name}" if where else name
        yield from changes(saved.get(name), now.get(name), kinds.get(name), path, field_class(kind, name, own))

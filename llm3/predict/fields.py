"""Which columns of the input a stage reads: those of a source that it was trained on, or those that flags name."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

from llm3.config.data_schema import SourceConfig
from llm3.data import formats
from llm3.data.formats import BadRow
from llm3.data.sources import hooks
from llm3.data.sources.inputs import Input
from llm3.errors import UserError, listed, nearest
from llm3.predict.trained import Trained
from llm3.registry import load_plugin

# fields of a source that a flag may set, by row format
FLAGS = {
    "text": ("text", "pair"),
    "dialogue": ("prompt", "messages"),
    "choice": ("prompt",),
    "span": ("text", "prompt"),
}
PROBED_ROWS = 1000  # rows that are searched for the columns


class Fields(NamedTuple):
    """How to read a row. name: of the source that the fields come from; "": they are given.

    answered: rows have answers, which are read too. plain: the column that a line of plain text stands for.
    """

    row_format: str
    source: SourceConfig
    name: str
    transforms: list[str]
    answered: bool = False
    plain: str = ""

    @property
    def plugin(self) -> ModuleType:
        """The plugin of the row format."""
        return _plugin(self.row_format)

    @property
    def columns(self) -> list[str]:
        """The columns that the predictions depend on, after the transforms."""
        specs = self.plugin.columns(self.source)
        specs += [self.source.answer] if self.answered and self.source.answer else []
        return list(dict.fromkeys(name for spec in specs for name in _columns(spec)))

    def described(self) -> dict[str, Any]:
        """The fields in JSON values, for the provenance of an output."""
        specs = {name: getattr(self.source, name) for name in FLAGS[self.row_format] if getattr(self.source, name)}
        return {"row_format": self.row_format, **specs, "transforms": self.transforms}

    def transformed(self, row: dict[str, Any], where: str) -> dict[str, Any]:
        """The row as its source would give it. Raises BadRow, and UserError if a transform fails."""
        return hooks.apply_transforms({self.plain: row["text"]} if self.plain else row, self.transforms, where)


@functools.cache
def _plugin(row_format: str) -> ModuleType:
    return load_plugin(formats, row_format)


def choose_fields(
    trained: Trained,
    what: str,
    readable: Sequence[str],
    given: Mapping[str, str],
    name: str | None,
    *,
    transforms: bool = True,
    answered: bool = False,
) -> Fields:
    """The fields for a kind of predictions.

    readable: the row formats that it reads. given: fields by flag. name: the source to take the others from.
    transforms: apply those of the source. answered: read the answers of dialogues too. Raises UserError.
    """
    known = trained.sources
    if name is not None and name not in known:
        raise UserError(f"--source={name}: {nearest(name, known)}")
    own, others = trained.trained_on, [each for each in known if each not in trained.trained_on]
    usable = [
        each for some in (own, others) for wanted in readable for each in some if known[each].row_format == wanted
    ]
    if name is not None and name not in usable and not given:
        raise UserError(
            f"--source={name}: --what={what} does not read its rows, which are of the format {known[name].row_format}; "
            f"{nearest(name, usable)}"
        )
    name = name or next(iter(usable), None)
    base = known[name] if name in usable and name else None
    ordered = ([base.row_format] if base else []) + [each for each in readable if not base or each != base.row_format]
    row_format = next((each for each in ordered if set(given) <= set(FLAGS[each])), None)
    if row_format is None:
        flags = ", or ".join(" and ".join(f"--{flag}" for flag in FLAGS[each]) for each in readable)
        raise UserError(f"--what={what}: {listed(f'--{each}' for each in given)}: expected {flags}")
    if base is None or base.row_format != row_format:
        needed = FLAGS[row_format] if row_format == "span" else FLAGS[row_format][:1]
        if missing := [each for each in needed if each not in given and not (row_format == "dialogue" and given)]:
            flags = " and ".join(f"--{each}=COLUMN" for each in missing)
            raise UserError(f"--what={what}: {trained.where} was trained on no rows for it: expected {flags}")
        base, name = SourceConfig(path="json", data_files="-", text=""), ""
    values: dict[str, Any] = _consistent(given)
    base = dataclasses.replace(base, **values)
    if answered and row_format == "dialogue" and not (base.messages or base.answer):
        raise UserError(
            f"--what={what}: --prompt={base.prompt}: nothing names the answers; expected --messages or --text"
        )
    return Fields(row_format, base, name or "", _importable(base.transforms) if transforms else [], answered)


def _importable(transforms: Sequence[str]) -> list[str]:
    """The transforms. Raises UserError for one that cannot be imported from here."""
    for spec in transforms:
        try:
            hooks.load_function(spec, "transforms")
        except UserError as error:
            raise UserError(f"{error}; expected --config=FILE, beside which it is, or --no_transforms") from None
    return list(transforms)


def _consistent(given: Mapping[str, str]) -> dict[str, str]:
    """The given fields, without those of the source that they replace."""
    if "messages" in given:
        return {"prompt": "", "answer": "", **given}
    return {"messages": "", **given} if "prompt" in given else dict(given)


def check_columns(fields: Fields, rows: Input, keep: Sequence[str]) -> Fields:
    """The fields for this input. Raises UserError if none of its first rows has a column that they or `keep` name."""
    wanted, flags = fields.columns, " or ".join(f"--{each}" for each in FLAGS[fields.row_format])
    if rows.plain:
        if len(wanted) > 1 and not fields.transforms:
            raise UserError(
                f"--in={rows.name}: its rows are lines of text, but {fields.row_format} rows have the columns "
                f"{listed(wanted)}: expected JSON rows, or one column by {flags}"
            )
        fields = fields._replace(plain="text" if fields.transforms else wanted[0])
    before: dict[str, None] = {}
    after: dict[str, None] = {}
    for number, row in enumerate(rows.head(PROBED_ROWS)):
        if isinstance(row, BadRow):
            continue
        before |= dict.fromkeys(row)
        try:
            after |= dict.fromkeys(fields.transformed(row, f"--in={rows.name}: row {number}"))
        except BadRow:
            continue
        if after.keys() >= set(wanted) and before.keys() >= set(keep):
            return fields
    source = f", which source {fields.name!r} of the stage names" if fields.name else ""
    for each in wanted:
        if after and each not in after:
            raise UserError(f"--in={rows.name}: no column {each!r}{source}; set {flags}: {nearest(each, after)}")
    for each in keep:
        if before and each not in before:
            raise UserError(f"--keep: --in={rows.name} has no column {each!r}: {nearest(each, before)}")
    return fields


def _columns(spec: str) -> list[str]:
    try:
        return formats.columns_of(spec)
    except ValueError as error:
        raise UserError(
            f"field {spec!r}: {error}; expected a column, or a template like '{{title}}: {{body}}'"
        ) from None

"""Predicting all rows of an input: they are read in order, encoded, predicted and written, some at a time."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

from llm3.config.model_schema import check_length
from llm3.data.cache.shards import BatchEncoder
from llm3.data.formats import BadRow
from llm3.data.sources.inputs import LONGEST, Input, Row
from llm3.errors import UserError, nearest
from llm3.predict import kinds
from llm3.predict.fields import FLAGS, Fields, check_columns, choose_fields
from llm3.predict.session import Item, Session
from llm3.predict.trained import Trained
from llm3.registry import load_plugin, plugin_names

FIELD_FLAGS = frozenset(name for names in FLAGS.values() for name in names)
RENAMED = "input_{}"  # the name of a kept column that has the name of a prediction


class Request(NamedTuple):
    """What is asked for, checked without a device. keep: the columns to pass on; None: all. length: of a window.

    about: the provenance of the output.
    """

    trained: Trained
    kind: "Kind"
    fields: Fields
    rows: Input
    keep: list[str] | None
    length: int
    about: dict[str, Any]


class Kind(NamedTuple):
    """A kind of predictions with its options."""

    name: str
    plugin: ModuleType
    options: Any


def choose_kind(trained: Trained, name: str | None) -> tuple[str, ModuleType]:
    """The kind of this name; None: labels or spans by the head, proposals of a bidirectional model, answers of a causal
    one that was trained on dialogues, else scores. Raises UserError for one that the stage cannot have.
    """
    plugins = {each: load_plugin(kinds, each) for each in plugin_names(kinds)}
    possible = [each for each, plugin in plugins.items() if not plugin.refusal(trained)]
    if name is None:
        talks = any(trained.sources[each].is_conversation for each in trained.trained_on)
        order = ("labels", "spans", "proposals", *(("answers",) if talks else ()), "scores", "embeddings")
        name = next(each for each in order if each in possible)
    if name not in plugins:
        raise UserError(f"--what={name}: {nearest(name, plugins)}")
    if why := plugins[name].refusal(trained):
        raise UserError(f"--what={name}: {trained.where} cannot: {why}; possible: {', '.join(possible)}")
    return name, plugins[name]


def columns_of(kind: Kind, trained: Trained) -> dict[str, Any]:
    """{column of the predictions: its type}"""
    return kind.plugin.columns(trained, kind.options)


def parts(rows: Input, size: int, first: int) -> Iterator[tuple[int, list[Row]]]:
    """Yield (number of a part, its rows) from part `first` on."""
    left = itertools.islice(rows.rows(), first * size, None)
    for number in itertools.count(first):
        if not (some := list(itertools.islice(left, size))):
            return
        yield number, some


def predict_rows(
    session: Session, kind: Kind, rows: Sequence[Row], first: int, keep: Sequence[str] | None
) -> list[dict[str, Any]]:
    """The output of rows, one for each, in their order. first: the number of the first. keep: columns; None: all."""
    usable = read_items(session, kind, rows, first)
    items = [each for each in usable if isinstance(each, Item)]
    found = iter(kind.plugin.predict(session, items) if items else [])
    columns = list(columns_of(kind, session.trained))
    output = []
    for row, each in zip(rows, usable, strict=True):
        result = next(found) if isinstance(each, Item) else each
        values = {} if isinstance(result, BadRow) else result
        error = {"error": str(result) if isinstance(result, BadRow) else None}
        output.append(kept(row, keep, [*columns, "error"]) | {name: values.get(name) for name in columns} | error)
    return output


def kept(row: Row, keep: Sequence[str] | None, taken: Sequence[str]) -> dict[str, Any]:
    """The columns of the input that are passed on, with other names for those that are taken."""
    if isinstance(row, BadRow):
        return dict.fromkeys(RENAMED.format(name) if name in taken else name for name in keep or ())
    names = row if keep is None else keep
    return {RENAMED.format(name) if name in taken else name: row.get(name) for name in names}


def read_items(session: Session, kind: Kind, rows: Sequence[Row], first: int) -> list[Item | BadRow]:
    """Each row with its record and its tokens, or why it cannot be used."""
    fields, trained = session.fields, session.trained
    records = [_record(row, number, kind, fields) for number, row in enumerate(rows, first)]
    texts = (text for each in records if not isinstance(each, BadRow) for text in fields.plugin.texts(each))
    tokenizer = BatchEncoder(session.tokenizer, texts)
    result: list[Item | BadRow] = []
    for number, record in enumerate(records, first):
        if isinstance(record, BadRow):
            result.append(record)
            continue
        try:
            document = kind.plugin.encode(record, fields, trained, tokenizer, kind.options)
            result.append(Item(number, record, document))
        except BadRow as reason:
            result.append(reason)
    return result


def _record(row: Row, number: int, kind: Kind, fields: Fields) -> dict[str, Any] | BadRow:
    if isinstance(row, BadRow):
        return row
    try:
        record = kind.plugin.read(fields.transformed(row, f"row {number}"), fields)
        if sum(len(text.encode()) for text in fields.plugin.texts(record)) > LONGEST:
            raise BadRow(f"longer than {LONGEST:,} bytes")
        return record
    except BadRow as reason:
        return reason


def read_options(plugin: ModuleType, name: str, given: Mapping[str, Any]) -> Any:
    """The options of a kind from the flags that were given; None if it has none. Raises UserError."""
    known = list(plugin.Options.__dataclass_fields__) if hasattr(plugin, "Options") else []
    for flag in given:
        if flag not in known:
            raise UserError(f"--{flag}: --what={name} does not use it; {nearest(flag, known)}")
    try:
        return plugin.Options(**given) if known else None
    except UserError as error:
        raise UserError(f"--{str(error).removeprefix('config: ')}") from None


def prepare(
    trained: Trained,
    rows: Input,
    what: str | None,
    flags: Mapping[str, Any],
    *,
    source: str | None,
    keep: str,
    length: int | None,
    transforms: bool,
) -> Request:
    """Check what is asked for. flags: fields of a source and options of the kind. Raises UserError."""
    name, plugin = choose_kind(trained, what)
    kind = Kind(name, plugin, read_options(plugin, name, {k: v for k, v in flags.items() if k not in FIELD_FLAGS}))
    specs = {flag: value for flag, value in flags.items() if flag in FIELD_FLAGS}
    answered = getattr(plugin, "ANSWERED", False)
    fields = choose_fields(trained, name, plugin.FORMATS, specs, source, transforms=transforms, answered=answered)
    columns = None if keep == "all" else [] if keep == "none" else keep.split(",")
    fields = check_columns(fields, rows, columns or [])
    length = length or trained.length
    check_length(trained.model, length, "--sequence_length")
    options = {} if kind.options is None else vars(kind.options)
    if length < (least := plugin.least_length(kind.options)):
        with_options = "".join(f" --{option}={flags[option]}" for option in options if option in flags)
        raise UserError(f"--sequence_length={length}: --what={name}{with_options} needs at least {least} tokens")
    about = {
        "stage": trained.name,
        "step": trained.meta["step"],
        "params_digest": trained.meta["params_digest"],
        "tokenizer": trained.meta["tokenizer_hash"],
        "input_digest": rows.digest,
        "what": name,
        "options": options,
        "fields": fields.described(),
        "keep": keep,
        "sequence_length": length,
        "rows_at_a_time": plugin.ROWS,
    }
    return Request(trained, kind, fields, rows, columns, length, about)
